"""Files and answers of commit 0b4ebac against the code as it is now: see `make_later.py`, which wrote `later`.

Exits are compared exactly, in float32. Logits are computed in float64, since float32 rounds in other places on another
machine: they differ from the stored ones by what those had rounded, at most 4e-6 of the largest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from badge_peft.tuner.adapter_file import CONFIG_TENSOR
from badge_peft.tuner.config_rules import REMOVED

DATA = Path(__file__).parent / "later"
ADAPTERS = sorted(path.name for path in (DATA / "adapters").iterdir())
INPUTS = ("input_ids", "attention_mask")


def read(*parts: str) -> Any:
    """A JSON file."""
    return json.loads(DATA.joinpath(*parts).read_text(encoding="utf-8"))


def tensors(*parts: str) -> dict[str, Tensor]:
    """A safetensors file."""
    return load_file(DATA.joinpath(*parts))


def load(*names: str) -> Any:
    """A PEFT model with these adapters of one base, in eval mode; one adapter is called `default`."""
    base = read("answers", f"{names[0]}.json")["base"]
    kind = AutoModelForTokenClassification if names[0] == "tokens" else AutoModelForSequenceClassification
    as_ = {} if len(names) == 1 else {"adapter_name": names[0]}
    folder = str(DATA / "adapters" / names[0])
    model: Any = PeftModel.from_pretrained(kind.from_pretrained(DATA / "bases" / base), folder, **as_)
    for name in names[1:]:
        model.load_adapter(str(DATA / "adapters" / name), adapter_name=name)
    return model.eval()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal to what the stored logits have rounded."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted.double(), rtol=0, atol=5e-6 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_full_depth_and_early_exits(name: str) -> None:
    model, exact, stored = load(name), load(name).double(), tensors("answers", f"{name}.safetensors")
    batch = {key: stored[key] for key in INPUTS}
    with torch.no_grad():
        full = exact(**batch)
    assert_close(full.logits, stored["logits"])
    assert_close(full.exit_logits, stored["exit_logits"])
    calls = read("answers", f"{name}.json")["calls"]
    assert any(len({*torch.tensor(call["exit_layer"]).flatten().tolist()}) > 1 for call in calls)
    for i, call in enumerate(calls):
        for one in (model, exact):
            answer = one.early_exit_forward(**batch, early_exit_config=call["rule"] or None)
            layers = answer.token_exit_layer if name == "tokens" else answer.exit_layer
            assert layers.tolist() == call["exit_layer"], call["rule"]
        assert_close(answer.logits, stored[f"early_logits.{i}"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_saved_as_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)  # PEFT looks for the base model, whose name is a relative path
    load(name).save_pretrained(tmp_path)
    found, wanted = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, DATA / "adapters" / name)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted if key != CONFIG_TENSOR)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    made = ("badge_version", "peft_version", "base_model_name_or_path", "weights_hash", *REMOVED)
    expected = {
        key: x for key, x in read("adapters", name, "adapter_config.json").items() if key not in (*made, *REMOVED)
    }
    assert {key: config.get(key, "missing") for key in expected} == expected


def test_tasks_in_one_pass_and_in_one_file() -> None:
    facts, stored = read("answers", "tasks.json"), tensors("answers", "tasks.safetensors")
    batch = {key: stored[key] for key in INPUTS}
    model = load(*facts["rules"])
    for dtype in (torch.float32, torch.float64):
        answers = model.to(dtype).early_exit_forward(
            **batch, tasks=list(facts["rules"]), early_exit_config=facts["rules"]
        )
        for name, layers in facts["exit_layer"].items():
            assert answers[name].exit_layer.tolist() == layers
    for name in facts["exit_layer"]:
        assert_close(answers[name].logits, stored[f"{name}.logits"])
    pytest.importorskip("onnxruntime")
    from badge_peft.export import OnnxTasksModel

    session = OnnxTasksModel.from_pretrained(DATA / "tasks", threads=1)
    found = session(**{key: value.numpy() for key, value in batch.items()})
    for name, layers in facts["exit_layer"].items():
        assert found[name].exit_layer.tolist() == layers
        torch.testing.assert_close(torch.from_numpy(found[name].logits), stored[f"{name}.logits"], rtol=0, atol=1e-4)


def test_a_query_in_one_file() -> None:
    pytest.importorskip("onnxruntime")
    from badge_peft.export import OnnxEarlyExitModel

    stored = tensors("ranking", "answers.safetensors")
    answer = OnnxEarlyExitModel.from_pretrained(DATA / "ranking", threads=1)(*(stored[key].numpy() for key in INPUTS))
    assert answer.exit_layer.tolist() == stored["exit_layer"].tolist()
    assert len(set(answer.exit_layer.tolist())) > 1
    torch.testing.assert_close(torch.from_numpy(answer.logits), stored["logits"], rtol=0, atol=1e-5)
