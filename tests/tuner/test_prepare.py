from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper

import badge_peft
from badge_peft import ARCHITECTURES, BadgeConfig
from badge_peft.tuner.exits import EXITS
from badge_peft.tuner.saved_modules import answer_by_adapters
from tests.models import CASES, HIDDEN, blocks_of, exits_of, make_badge, make_batch, make_model


def unchanged(base: Any) -> Any:
    """A check, to be called later, that nothing was put on `base` and that it answers as now."""
    names = [name for name, _ in base.named_modules()]
    trainable = [p.requires_grad for p in base.parameters()]
    config = base.config.to_dict()
    with torch.no_grad():
        logits = base(**make_batch()).logits

    def check() -> None:
        assert [name for name, _ in base.named_modules()] == names
        assert [p.requires_grad for p in base.parameters()] == trainable
        assert base.config.to_dict() == config and not hasattr(base, "peft_config")
        with torch.no_grad():
            assert torch.equal(base(**make_batch()).logits, logits)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())

    return check


@pytest.mark.parametrize("case", CASES)
def test_what_is_filled_in(case):
    model = make_badge(case)
    config = model.peft_config["default"]
    depth = 4 if case.startswith("albert-") else 3
    assert (config.num_blocks, config.hidden_size, config.num_labels) == (depth, HIDDEN, 3)
    assert config.problem_type is None and config.badge_version == badge_peft.__version__
    assert {name for name, m in model.get_base_model().named_modules() if m in blocks_of(model)} == {
        name for name in dict(model.get_base_model().named_modules()) if re.fullmatch(config.target_modules, name)
    }
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    ("case", "fields", "saved"),
    [
        ("bert", {}, {"classifier"}),
        ("deberta-v2", {}, {"pooler", "classifier"}),
        ("distilbert", {}, {"pre_classifier", "classifier"}),
        ("modernbert-cls", {}, {"head", "classifier"}),
        ("roberta", {"train_head": False}, set()),
        ("modernbert-cls", {"train_head": False}, set()),
        ("distilbert", {"final_exit": "exit"}, set()),
        ("bert", {"modules_to_save": ["pooler"]}, {"pooler", "classifier"}),
        ("bert", {"modules_to_save": ["word_embeddings"], "final_exit": "exit"}, {"word_embeddings"}),
    ],
)
def test_modules_that_are_trained_and_saved_beside_the_adapter(case, fields, saved):
    model = make_badge(case, **fields)
    trained = {
        name.split(".modules_to_save.")[0] for name, p in model.named_parameters() if ".modules_to_save." in name
    }
    assert {name.split(".")[-1] for name in trained} == saved
    assert all(
        p.requires_grad == (".badge_" in name or ".modules_to_save." in name) for name, p in model.named_parameters()
    )


@pytest.mark.parametrize(("case", "wrappers"), [("bert", 1), ("distilbert", 2), ("deberta-v2", 2)])
def test_each_saved_module_has_one_hook(case, wrappers):
    """By which rows go through their adapter's own head: tests/early_exit/test_adapter_names.py."""

    def hooks(model: Any) -> list[int]:
        saved = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        return [list(module._forward_hooks.values()).count(answer_by_adapters) for module in saved]

    model = make_badge(case)
    model.add_adapter("second", BadgeConfig())
    assert hooks(model) == [1] * wrappers
    assert type(model.get_base_model().classifier) is ModulesToSaveWrapper  # PEFT's own
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.add_adapter("third", BadgeConfig())
        assert hooks(copied) == [1] * wrappers
    base = model.unload()
    assert not any(module._forward_hooks for module in base.modules())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_layers": [2, 5]}, r"exit_layers=\[2, 5\] names block 5, but the model has 3"),
        ({"exit_weights": [1.0, 1.0]}, "exit_weights has 2 numbers, but there are 3 exits"),
        ({"num_labels": 4}, "num_labels=4, but the model's head has 3.*final_exit='exit'"),
        ({"hidden_size": 768}, "hidden_size=768, but the model has hidden_size=32.*base_model_name_or_path"),
        ({"num_blocks": 12}, "num_blocks=12, but the model has num_blocks=3"),
        ({"label_names": ["a", "b"]}, r"label_names=\['a', 'b'\] has 2 names, but num_labels=3"),
        *(
            ({"modules_to_save": names}, f"modules_to_save='{names[-1]}' is not allowed: .* is or holds a block")
            for names in (["encoder"], ["bert"], ["embeddings", "layer.1"])
        ),
        ({"target_modules": "query"}, "target_modules='query' is not allowed.*exit_layers"),
        ({"base_fingerprint": {"classifier.weight": [1.0, 2.0, 3.0, 4.0]}}, "made for another backbone"),
    ],
)
def test_config_that_does_not_fit_the_model(fields, message):
    base = make_model()
    check = unchanged(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, BadgeConfig(**fields))
    check()
    assert exits_of(make_badge(base=base), make_batch()).shape == (4, 3, 3)


OWN_NAMES = {
    part
    for exit_ in EXITS.values()
    for name, _ in [*exit_(4, 2, 0.0).named_modules(), *exit_(4, 2, 0.0).named_parameters()]
    for part in name.split(".")
}


@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-cls"])
def test_adapter_with_the_name_of_a_module(case):
    of_models = "classifier dense embeddings 1 0 12 weight bias down up norm model base_model".split()
    of_wrappers = "base_layer modules_to_save original_module badge_bypass badge_exit badge_doubt badge_v1".split()
    names = sorted({*of_models, *of_wrappers, *OWN_NAMES} - {""})
    base = make_model(case)
    check = unchanged(base)
    for name in names:
        with pytest.raises(ValueError, match=f"be called '{name}'.*Choose another name.*adapter_name="):
            get_peft_model(base, BadgeConfig(), adapter_name=name)
    check()
    model = make_badge(base=base)
    before = exits_of(model, make_batch())
    for name in names:
        with pytest.raises(ValueError, match=f"an adapter cannot be called '{name}'"):
            model.add_adapter(name, BadgeConfig())
        assert list(model.peft_config) == ["default"]
    assert torch.equal(exits_of(model, make_batch()), before)


@pytest.mark.parametrize("name", ["a.b", "keys", "forward", "training"])
def test_adapter_with_a_name_that_torch_cannot_store(name):
    base = make_model()
    check = unchanged(base)
    with pytest.raises(ValueError, match=f"an adapter cannot be called '{name}'"):
        get_peft_model(base, BadgeConfig(), adapter_name=name)
    check()


@pytest.mark.parametrize("name", ["default", "sst-2", "my_adapter", "Übung", "v2"])
def test_other_names_are_fine(name, tmp_path):
    model = make_badge(adapter_name=name)
    model.add_adapter("second", BadgeConfig(r=2))
    model.save_pretrained(tmp_path)
    before = exits_of(model, make_batch())
    back = get_peft_model(make_model(), BadgeConfig(), adapter_name="other")
    back.load_adapter(tmp_path if name == "default" else tmp_path / name, name)
    back.set_adapter(name)
    assert torch.equal(exits_of(back.eval(), make_batch()), before)


def test_labels_and_problem_type_come_from_the_model():
    model = make_badge(base=make_model(num_labels=5, problem_type="multi_label_classification"))
    config = model.peft_config["default"]
    assert (config.num_labels, config.problem_type) == (5, "multi_label_classification")
    model = make_badge(base=make_model(num_labels=5), num_labels=2, final_exit="exit", problem_type="regression")
    config = model.peft_config["default"]
    assert (config.num_labels, config.problem_type) == (2, "regression")
    assert exits_of(model, make_batch()).shape == (4, 3, 2)


def test_pooling_of_the_model_that_exits_do_not_know():
    layout = replace(ARCHITECTURES["bert"], pooling="hidden_act")  # the name of a field of the model's config
    with pytest.raises(ValueError, match="hidden_act='gelu' is not one of cls, mean, last.*exit_pooling"):
        get_peft_model(make_model(), BadgeConfig(block_layout=layout))
    model = make_badge(block_layout=layout, exit_pooling="mean")
    assert exits_of(model, make_batch()).shape == (4, 3, 3)


@pytest.mark.parametrize("train_head", [True, False])
def test_one_config_may_be_put_on_many_models(train_head, tmp_path):
    """Each has a copy with what was found out about it; heads have other names, and so have blocks."""
    config = BadgeConfig(r=4, train_head=train_head, modules_to_save=["embeddings"])
    heads = {"distilbert": ["pre_classifier", "classifier"], "bert": ["classifier"], "roberta": ["classifier"]}
    bases = {
        **{case: partial(make_model, case) for case in heads},
        "other weights": partial(make_model, seed=1),
        "larger": partial(make_model, num_labels=5, hidden_size=64, num_hidden_layers=2),
    }
    models = {}
    for name, base in bases.items():
        models[name] = get_peft_model(base(), config).eval()
        saved = ["embeddings", *(heads.get(name, ["classifier"]) if train_head else [])]
        assert models[name].peft_config["default"].modules_to_save == saved
        trained = {n.split(".modules_to_save.")[0] for n, p in models[name].named_parameters() if p.requires_grad}
        assert {n.split(".")[-1] for n in trained if "classifier" in n} == set(saved[1:])
    assert config.base_fingerprint is None and config.num_labels is None and config.hidden_size is None
    assert models["larger"].peft_config["default"].num_labels == 5
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        back = PeftModel.from_pretrained(bases[name](), tmp_path / name)
        assert torch.equal(exits_of(back.eval(), make_batch()), exits_of(model, make_batch()))
        assert copy.deepcopy(model).peft_config["default"] == model.peft_config["default"]


def test_one_config_may_be_two_adapters_of_a_model():
    config = BadgeConfig(r=4)
    model = get_peft_model(make_model(), config, adapter_name="one")
    model.add_adapter("two", config)
    one, two = model.peft_config["one"], model.peft_config["two"]
    assert one is not two and one.modules_to_save == two.modules_to_save == ["classifier"]
    two.early_exit = {"threshold": 0.5}
    assert one.early_exit is None and config.early_exit is None
    config.modules_to_save = ["embeddings"]  # another wish is another config
    model = get_peft_model(make_model(), config)
    assert model.peft_config["default"].modules_to_save == ["embeddings", "classifier"]


def test_a_config_that_does_not_fit_is_as_before():
    config = BadgeConfig(r=4, exit_layers=[9], modules_to_save=["embeddings"])
    with pytest.raises(ValueError, match="names block 9"):
        get_peft_model(make_model(), config)
    assert config.num_blocks is None and config.base_fingerprint is None
    model = get_peft_model(make_model(num_hidden_layers=9), config)
    assert model.peft_config["default"].modules_to_save == ["embeddings", "classifier"]
