"""The model's own pooler: where `pooled` exits start, and what `shared_pooled` exits read."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from badge_peft import BadgeConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.export import OnnxEarlyExitModel, export_onnx
from tests import reference
from tests.design import pairs
from tests.models import CASES, exits_of, make_badge, make_batch, make_labels, make_model, shake, trained
from tests.tuner.test_layer import compare

SHARED = {"exit_type": "shared_pooled"}
WITH = [case for case, (kind, _) in CASES.items() if kind in reference.POOLERS]
WITHOUT = [case for case in CASES if case not in WITH]


def test_both_kinds_of_backbones_are_there():
    assert {"bert", "roberta", "albert", "mpnet"} <= {*WITH}
    assert {"electra", "distilbert", "deberta-v2", "modernbert-cls"} <= {*WITHOUT}


def dense_layers(model):
    return [w for name, w in reference.own_weights(model).items() if name.endswith("dense.weight")]


@pytest.mark.parametrize("case", WITH)
def test_pooled_exits_start_from_it(case):
    base = make_model(case)
    pooler = copy.deepcopy(base.get_submodule(reference.POOLERS[base.config.model_type]))
    model = get_peft_model(base, BadgeConfig(exit_type="pooled", exit_layers=[0, 1, 2], train_head=False))
    found = reference.own_weights(model)
    assert len(dense_layers(model)) >= 3
    for name, value in found.items():
        if ".dense." in name:
            assert torch.equal(value, getattr(pooler, name.rpartition(".")[2])) and value.requires_grad
    model.add_adapter("other", BadgeConfig(exit_type="pooled"))
    assert torch.equal(reference.own_weights(model, "other")["exit.1.dense.weight"], pooler.weight)
    # and they are copies
    shake(model)
    own = model.get_base_model().get_submodule(reference.POOLERS[base.config.model_type])
    assert torch.equal(own.weight, pooler.weight)


@pytest.mark.parametrize("case", WITHOUT)
def test_other_models_have_none(case):
    model = get_peft_model(make_model(case), BadgeConfig(exit_type="pooled"))
    first, second = dense_layers(model)[:2]
    assert not torch.equal(first, second)
    base = make_model(case)
    before = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match="exit_type='shared_pooled' is not allowed on this .* use 'pooled'"):
        get_peft_model(base, BadgeConfig(**SHARED))
    assert before.keys() == dict(base.named_parameters()).keys()


@pytest.mark.parametrize(
    ("case", "placement", "pooling", "final_exit"),
    pairs(WITH, ("block", "mhsa", "none"), ("cls", "mean", "last"), ("base_head", "exit")),
)
def test_formulas(case, placement, pooling, final_exit):
    fields = {"placement": placement, "final_exit": final_exit, "exit_layers": [0, 1, 2], **SHARED}
    found = compare(case, pooling, **fields)
    base = make_model(case).double()
    model = make_badge(base=base, exit_pooling=pooling, **fields)
    rule = {"policy": "max_prob", "threshold": float(found.softmax(-1).amax(-1)[:, :-1].median()) + 1e-6}
    out = model.early_exit_forward(**make_batch(), early_exit_config=rule)
    want = build_policy(rule).replay(found, model.base_model.exit_layers())
    assert out.exit_layer.tolist() == want.tolist()


def test_twelve_exits_as_pabee_has_them():
    config = AutoConfig.for_model("bert", vocab_size=50, intermediate_size=8, num_labels=2)
    model = AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(model, BadgeConfig(placement="none", final_exit="exit", **SHARED))
    assert model.get_nb_trainable_parameters()[0] == 18_456


@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
@pytest.mark.parametrize("case", ["bert", "roberta", "albert"])
def test_it_is_trained_with_the_backbone(case, final_exit, tmp_path):
    model = trained(case, backbone="full", final_exit=final_exit, **SHARED).train()
    model(**make_batch(), labels=make_labels()).loss.backward()
    name = reference.POOLERS[make_model(case).config.model_type]
    gradients = [
        p.grad
        for key, p in model.named_parameters()
        if key.endswith(f"{name.split('.')[-1]}.weight") and p.requires_grad
    ]
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    before = exits_of(model.eval(), make_batch())
    model.save_pretrained(tmp_path)
    assert torch.equal(exits_of(PeftModel.from_pretrained(make_model(case), tmp_path), make_batch()), before)


def test_it_stays_as_it_is_with_a_frozen_backbone(tmp_path):
    base = make_model()
    before = copy.deepcopy(base.bert.pooler.state_dict())
    model = make_badge(base=base, **SHARED).train()
    model(**make_batch(), labels=make_labels()).loss.backward()
    assert not any("pooler" in name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None)
    assert all(torch.equal(value, before[name]) for name, value in base.bert.pooler.state_dict().items())


def test_the_copy_that_an_adapter_trains_with_its_head(tmp_path):
    """RoBERTa's pooler is part of its head, and `train_head` gives each adapter one of its own."""
    model = make_badge("roberta", **SHARED)
    model.add_adapter("other", BadgeConfig(r=4, **SHARED))
    shake(model, only=".modules_to_save.default.")
    shake(model, seed=5, only=".modules_to_save.other.")
    shake(model, seed=6, only=".other.")
    batch = make_batch()
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        found[name] = exits_of(model.eval(), batch)
        plain = make_model("roberta")
        plain.classifier = copy.deepcopy(model.base_model.model.classifier.modules_to_save[name])
        with torch.no_grad():
            weights = reference.own_weights(model, name)
            expected = reference.all_logits(plain, model.peft_config[name], weights, batch, "cls")
        torch.testing.assert_close(found[name], torch.stack(expected, dim=1))
    together = model.early_exit_forward(
        **{key: torch.cat([value, value]) for key, value in batch.items()},
        adapter_names=["default"] * 4 + ["other"] * 4,
        policy="fixed_depth",
        depth=1,
    )
    torch.testing.assert_close(together.logits, torch.cat([found["default"][:, 0], found["other"][:, 0]]))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(make_model("roberta"), tmp_path)
    assert torch.equal(exits_of(loaded, batch), found["default"])


def test_another_pooler_is_another_backbone(tmp_path):
    make_badge(final_exit="exit", **SHARED).save_pretrained(tmp_path)
    other = make_model()
    shake(other, only="pooler")
    with pytest.raises(ValueError, match="pooler"):
        PeftModel.from_pretrained(other, tmp_path)


def test_in_an_exported_file(one_translation, tmp_path):
    pytest.importorskip("onnx_ir")
    pytest.importorskip("onnxruntime")
    model, batch = make_badge(exit_layers=[0, 1], **SHARED), make_batch()
    export_onnx(model, tmp_path, early_exit_config={"policy": "fixed_depth", "depth": 1})
    found = OnnxEarlyExitModel.from_pretrained(tmp_path)(**{name: x.numpy() for name, x in batch.items()})
    wanted = exits_of(model, batch)[:, 1]
    torch.testing.assert_close(
        torch.from_numpy(found.logits), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
    )


def test_with_weights_of_another_precision():
    model = make_badge(**SHARED)
    wide = exits_of(model, make_batch())
    for name, parameter in model.named_parameters():
        if ".badge_" not in name:
            parameter.data = parameter.data.bfloat16()
    found = exits_of(model, make_batch())
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 0].float(), wide[:, 0], rtol=0.2, atol=0.2 * float(wide.abs().max()))
