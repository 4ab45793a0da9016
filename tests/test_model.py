from __future__ import annotations

import warnings
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from badge_peft import BadgeBlock, BadgeConfig, BadgeModel, EarlyExitConfig
from tests import reference
from tests.models import (
    CASES,
    blocks_of,
    checkpoint,
    exits_of,
    make_badge,
    make_batch,
    make_labels,
    make_model,
    shake,
)

SECOND: dict[str, Any] = {"r": 2, "placement": "ffn", "num_labels": 5, "final_exit": "exit", "exit_layers": [0, 1, 3]}


def two_adapters(**second: Any) -> Any:
    model = make_badge()
    model.add_adapter("second", BadgeConfig(**{**SECOND, **second}))
    shake(model, seed=7)
    return model.eval()


def trained_adapters(model: Any) -> set[str]:
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".badge_" in name]
    return {name.split(".badge_")[1].split(".")[1] for name in names}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch()).logits


# ---- what it is


def test_what_it_tells():
    model = make_badge(exit_layers=[0, 2], bias=True)
    tuner = model.base_model
    assert isinstance(tuner, BadgeModel) and model.active_adapter == "default"
    assert tuner.num_blocks == 3 and tuner.exit_layers() == tuner.exit_layers("default") == [0, 2, 3]
    with pytest.raises(ValueError, match="no adapter 'other'; the model has 'default'"):
        tuner.exit_layers("other")


@pytest.mark.parametrize("case", CASES)
def test_status_as_peft_reports_it(case):
    model = make_badge(case)
    model.add_adapter("other", BadgeConfig(r=2))
    status = model.get_model_status()
    assert status.adapter_model_type == "BadgeModel" and status.peft_types == {"default": "BADGE", "other": "BADGE"}
    assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    layers = [layer for layer in model.get_layer_status() if layer.module_type == "badge.BadgeBlock"]
    assert len(layers) == len(blocks_of(model))


def test_number_of_trainable_parameters():
    model = make_badge()
    own = sum(p.numel() for p in reference.own_weights(model).values())
    head = 3 * 33
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == own + head
    assert total == own + head + sum(p.numel() for p in make_model().parameters())


def test_config_of_the_model_is_as_peft_leaves_it():
    model = make_badge()
    assert model.config is model.get_base_model().config
    assert model.get_base_model().config.model_type == "bert"
    assert model.device == torch.device("cpu") and model.dtype == torch.float32


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_is_in_the_mode_of_its_model(training):
    """One that joins a model in eval mode must not drop anything, whoever forgets to call eval() again."""
    model = get_peft_model(make_model().train(training), BadgeConfig(final_exit="exit", exit_dropout=0.5))
    model.add_adapter("second", BadgeConfig(final_exit="exit", exit_dropout=0.5))
    for name in ("default", "second"):
        model.set_adapter(name)
        assert torch.equal(exits_of(model, make_batch()), exits_of(model, make_batch())) != training
    assert {m.training for m in model.modules() if isinstance(m, nn.Dropout) and m.p == 0.5} == {training}


# ---- several adapters


def test_each_adapter_has_its_own_exits():
    model = two_adapters()
    first = exits_of(model, make_batch())
    model.set_adapter("second")
    second = exits_of(model, make_batch())
    assert first.shape == (4, 3, 3) and second.shape == (4, 3, 5)
    model.set_adapter("default")
    assert torch.equal(exits_of(model, make_batch()), first)
    model.set_adapter("second")
    assert torch.equal(exits_of(model, make_batch()), second)


@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-mean"])
def test_an_adapter_beside_another_is_as_it_is_alone(case):
    alone = make_badge(case, adapter_name="second", **SECOND)
    model = make_badge(case)
    model.add_adapter("second", BadgeConfig(**SECOND))
    weights = {name: p for name, p in alone.state_dict().items() if ".badge_" in name}
    model.load_state_dict(weights, strict=False)
    model.set_adapter("second")
    assert torch.equal(exits_of(model.eval(), make_batch()), exits_of(alone, make_batch()))


def test_full_depth_of_an_adapter_without_a_head_of_its_own():
    """The heads that two adapters train are apart, and an adapter that trains none has the model's."""
    model = make_badge()
    model.add_adapter("other", BadgeConfig(r=2))
    model.add_adapter("plain", BadgeConfig(r=2, train_head=False))
    shake(model, only=".modules_to_save.")
    expected = logits_of(make_model())
    answers = {}
    for name in ("default", "other", "plain"):
        model.set_adapter(name)
        answers[name] = logits_of(model)
    assert torch.equal(answers["plain"], expected)
    assert not torch.equal(answers["default"], expected) and not torch.equal(answers["other"], answers["default"])


def test_only_the_active_adapter_is_trained():
    model = two_adapters()

    assert trained_adapters(model) == {"default"}
    model.set_adapter("second")
    assert trained_adapters(model) == {"second"}
    model.train()(**make_batch(), labels=make_labels(num_labels=5)).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if ".second." in name}
    model.set_adapter("default", inference_mode=True)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_delete_an_adapter():
    model = two_adapters()
    first = exits_of(model, make_batch())
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not [name for name, _ in model.named_modules() if "second" in name.split(".")]
    assert all("second" not in block.badge_placement for block in blocks_of(model))
    assert torch.equal(exits_of(model, make_batch()), first)
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")
    model.add_adapter("second", BadgeConfig(**SECOND))
    model.set_adapter("second")
    assert exits_of(model, make_batch()).shape == (4, 3, 5)


def test_delete_the_active_adapter():
    model = two_adapters()
    model.set_adapter("second")
    second = exits_of(model, make_batch())
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapter == "second"
    assert torch.equal(exits_of(model, make_batch()), second)
    assert trained_adapters(model) == {"second"}


def test_without_any_adapter_it_is_the_base_model():
    model = make_badge()
    shake(model, only=".modules_to_save.")
    model.delete_adapter("default")
    with torch.no_grad():
        out = model.base_model(**make_batch())
    assert "exit_logits" not in out and torch.equal(out.logits, logits_of(make_model()))


def test_without_its_adapter_a_trained_backbone_is_frozen():
    model = make_badge(backbone="full")
    assert [name for name, p in model.named_parameters() if p.requires_grad]
    model.delete_adapter("default")
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_two_active_adapters_are_refused():
    model = two_adapters(num_labels=3)
    before = exits_of(model, make_batch())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"one active adapter, got \['default', 'second'\]: call set_adapter"):
        model(**make_batch())
    model.set_adapter("default")
    assert torch.equal(exits_of(model, make_batch()), before)


@pytest.mark.parametrize("fields", [{}, {"bias": True, "placement": "ffn"}, {"final_exit": "exit"}], ids=str)
def test_disabled_adapter_is_the_base_model(fields):
    model = make_badge(**fields)
    shake(model, only=".modules_to_save.")
    before = exits_of(model, make_batch())
    base, labels = make_model(), make_labels()
    expected = base(**make_batch(), labels=labels)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # PEFT's own would warn of a bias as LoRA has them
        with model.disable_adapter():
            out = model(**make_batch(), labels=labels)
    assert type(out) is type(expected)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    assert torch.equal(exits_of(model, make_batch()), before)
    model.base_model.disable_adapter_layers()
    assert not model.base_model.adapters_enabled and torch.equal(logits_of(model), expected.logits)
    model.base_model.enable_adapter_layers()
    assert torch.equal(exits_of(model, make_batch()), before)


# ---- how an adapter stops


def test_early_exit_config_of_each_adapter():
    model = make_badge(early_exit={"threshold": 0.3})
    model.add_adapter("second", BadgeConfig(**SECOND, early_exit=EarlyExitConfig(policy="patience", patience=2)))
    assert model.get_early_exit_config() == EarlyExitConfig(threshold=0.3)
    assert model.get_early_exit_config("second") == EarlyExitConfig(policy="patience", patience=2)
    model.set_early_exit_config({"policy": "never"}, "second")
    model.set_early_exit_config(EarlyExitConfig(patience=1))
    assert model.get_early_exit_config("second") == EarlyExitConfig(policy="never")
    assert model.get_early_exit_config() == EarlyExitConfig(patience=1)
    model.set_early_exit_config(None)
    assert model.get_early_exit_config() == EarlyExitConfig()
    model.set_adapter("second")
    assert model.get_early_exit_config() == EarlyExitConfig(policy="never")


def test_early_exit_config_that_is_given_out_cannot_be_changed():
    model = make_badge()
    fields = {"threshold": 0.3, "calibration": {"rows": 5}}
    model.set_early_exit_config(fields)
    fields["calibration"]["rows"] = 6
    with pytest.raises(FrozenInstanceError):
        model.get_early_exit_config().threshold = 0.8
    assert model.get_early_exit_config() == EarlyExitConfig(threshold=0.3, calibration={"rows": 5})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.get_early_exit_config("other"), "no adapter 'other'"),
        (lambda model: model.set_early_exit_config({}, "other"), "no adapter 'other'"),
        (lambda model: model.set_early_exit_config({"patience": 0}), "patience=0"),
        (lambda model: model.set_early_exit_config({"tau": 0.2}), "no field tau"),
        (lambda model: model.set_early_exit_config(0.2), "got float"),
    ],
)
def test_wrong_early_exit_config_changes_nothing(call, message):
    model = make_badge(early_exit={"threshold": 0.3})
    with pytest.raises(ValueError, match=message):
        call(model)
    assert model.get_early_exit_config() == EarlyExitConfig(threshold=0.3)


# ---- what is trained


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "fields",
    [
        {"final_exit": "base_head"},
        {"final_exit": "exit"},
        {"final_exit": "exit", "placement": "ffn"},
        {"final_exit": "exit", "placement": "none"},
        {"final_exit": "exit", "placement": "mhsa", "exit_layers": [2]},
    ],
    ids=str,
)
def test_everything_that_is_trained_has_a_gradient(case, fields):
    """A distributed trainer would wait for the others forever."""
    model = make_badge(case, backbone="full", **fields).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)
    model(**make_batch(), labels=make_labels()).loss.backward()
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}


def test_embeddings_trained_behind_frozen_blocks_need_their_gradients():
    model = make_badge(modules_to_save=["word_embeddings"]).train()
    checkpoint(model, {"use_reentrant": True})
    with pytest.raises(RuntimeError, match="re-entrant"):
        model(**make_batch(), labels=make_labels())


# ---- what is refused (more of it: tests/peft_verbs/test_refused.py)


def outermost(model):
    return model


@pytest.mark.parametrize("inner", [outermost, lambda model: model.get_base_model()], ids=["PEFT model", "base model"])
@pytest.mark.parametrize("name", ["default", "second"])
def test_a_second_wrapping_is_refused(inner, name):
    model = make_badge()
    before, config = exits_of(model, make_batch()), model.peft_config["default"]
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(ValueError, match="already carries a BADGE adapter"),
    ):
        get_peft_model(inner(model), BadgeConfig(r=2), adapter_name=name)
    assert model.peft_config == {"default": config} and torch.equal(exits_of(model, make_batch()), before)


# ---- leaving


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("placement", ["block", "mhsa"])
def test_unload_gives_the_base_model_back(case, placement):
    fresh = make_model(case)
    model = make_badge(case, placement=placement)
    model.add_adapter("second", BadgeConfig(placement="ffn", final_exit="exit"))
    shake(model, only=".modules_to_save.")
    exits_of(model, make_batch())
    base = model.unload()
    assert type(base) is type(fresh) and repr(base) == repr(fresh)
    assert not any(isinstance(module, BadgeBlock) for module in base.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert base.config.to_dict() == fresh.config.to_dict()
    weights = fresh.state_dict()
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert torch.equal(logits_of(base), logits_of(fresh))
    again = make_badge(base=base)
    assert torch.equal(exits_of(again, make_batch()), exits_of(make_badge(case), make_batch()))


def test_unloaded_model_trains():
    base = make_badge().unload().requires_grad_(True).train()
    base(**make_batch(), labels=make_labels()).loss.backward()
    assert all(p.grad is not None for p in base.parameters())


def test_keys_that_trainer_ignores_are_restored():
    base = make_model()
    base.config.keys_to_ignore_at_inference = ["something"]
    model = make_badge(base=base)
    assert {"something", "exit_logits"} <= set(model.config.keys_to_ignore_at_inference)
    assert isinstance(model.unload(), nn.Module)
    assert base.config.keys_to_ignore_at_inference == ["something"]
