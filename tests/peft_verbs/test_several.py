"""Several adapters of every kind on one model: each answers as when it is alone, whatever was done in between."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.models import make_batch, make_model, one_of_each_kind, trained
from tests.peft_verbs.table import ARCHITECTURES
from tests.peft_verbs.test_same_answers import answers, same

# Different r, placements, exit layers, numbers of labels, heads and rules.
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 2, "early_exit": {"policy": "max_prob", "threshold": 0.5}},
    "two": {"r": 8, "placement": "ffn", "exit_layers": [1], "train_head": False},
    "three": {"placement": "mhsa", "final_exit": "exit", "num_labels": 5, "exit_type": "mha"},
    "four": {"placement": "none", "exit_layers": [0, 2], "early_exit": {"policy": "fixed_depth", "depth": 2}},
    "five": {"backbone": "lora", "r": 3, "early_exit": {"policy": "patience", "patience": 1}},
    "six": {"exit_type": "past_future", "final_exit": "exit", "num_labels": 1, "problem_type": "regression"},
    "seven": {"learn_to_exit": True, "early_exit": {"policy": "learned"}},
}

LOW = ("three", "five")  # are loaded with low_cpu_mem_usage


def save_each(case: str, path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Each adapter alone on a model of its own, in a folder by its name; what it answers there."""
    alone = {}
    for name, fields in ADAPTERS.items():
        model = trained(case, **fields)
        model.save_pretrained(path / name)
        alone[name] = answers(model)
    return alone


def load_all(case: str, path: Path) -> Any:
    first, *others = ADAPTERS
    model = PeftModel.from_pretrained(make_model(case), path / first, adapter_name=first)
    for name in others:
        model.load_adapter(path / name, name, low_cpu_mem_usage=name in LOW)
    return model


@pytest.mark.parametrize("case", one_of_each_kind(ARCHITECTURES))
def test_each_answers_as_when_alone(case: str, tmp_path: Path) -> None:
    alone = save_each(case, tmp_path)
    model = load_all(case, tmp_path)
    with torch.no_grad():
        base = make_model(case)(**make_batch()).logits
    order = 2 * list(ADAPTERS)
    random.Random(0).shuffle(order)
    for name in order:
        model.set_adapter(name)
        assert model.active_adapter == name and same(answers(model), alone[name], name not in LOW), name
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(model(**make_batch()).logits, base)
    for gone in ("three", "five", "one"):
        model.delete_adapter(gone)
        for name in model.peft_config:
            model.set_adapter(name)
            assert same(answers(model), alone[name], name not in LOW), (gone, name)
    model.load_adapter(tmp_path / "three", "one")  # another adapter under the name of one that is gone
    model.set_adapter("one")
    assert same(answers(model.eval()), alone["three"])
    with torch.no_grad():
        assert torch.equal(model.unload()(**make_batch()).logits, base)


@pytest.mark.parametrize("case", ["bert", "albert"])
def test_selected_adapters_are_saved_apart(case: str, tmp_path: Path) -> None:
    alone = save_each(case, tmp_path / "alone")
    model = load_all(case, tmp_path / "alone")
    model.save_pretrained(tmp_path / "some", selected_adapters=["two", "five"])
    assert {path.name for path in (tmp_path / "some").iterdir() if path.is_dir()} == {"two", "five"}
    model.save_pretrained(tmp_path / "all")
    for folder, names in (("some", ["two", "five"]), ("all", list(ADAPTERS))):
        for name in names:
            again = PeftModel.from_pretrained(make_model(case), tmp_path / folder / name)
            assert same(answers(again), alone[name]), (folder, name)
    with pytest.raises(ValueError, match=r"current supported adapter names are \['one', .* got \['eight'\]"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["eight"])
    assert not (tmp_path / "none").exists()


def test_training_one_leaves_the_others_alone(tmp_path: Path) -> None:
    alone = save_each("bert", tmp_path)
    model = load_all("bert", tmp_path)
    for name in ("one", "five", "seven"):
        model.set_adapter(name)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.1)
        model.train()(**make_batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        for other in ADAPTERS:
            model.set_adapter(other)
            assert same(answers(model), alone[other], other not in LOW) == (other != name), (name, other)
        model.set_adapter(name)
        alone[name] = answers(model)


def test_deleting_the_active_one_makes_another_answer_as_when_alone(tmp_path: Path) -> None:
    alone = save_each("bert", tmp_path)
    model = load_all("bert", tmp_path)
    model.delete_adapter("seven")  # not the active one: nothing else changes
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for gone in ("one", "two", "three", "five", "four"):
        model.set_adapter(gone)
        with pytest.warns(UserWarning, match="was active"):
            model.delete_adapter(gone)
        left = model.active_adapter
        assert same(answers(model), alone[left], left not in LOW), (gone, left)
        assert not any(parameter.requires_grad for parameter in model.parameters())
