from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from badge_peft.tuner.backbone import FIELDS, _sample, check_fingerprint, fingerprint
from tests.models import CASES, make_badge, make_model


@pytest.mark.parametrize("case", CASES)
def test_names_and_values_are_those_of_the_base_model(case):
    base = make_model(case)
    parameters = dict(base.named_parameters())
    found = fingerprint(base)
    kinds = {re.sub(r"\d+", "#", name) for name, p in parameters.items() if p.dim() in (1, 2)}
    sampled = {name: values for name, values in found.items() if name in parameters}
    assert {re.sub(r"\d+", "#", name) for name in sampled} == kinds
    assert len(sampled) <= 8 + len(kinds)
    assert found.keys() - sampled.keys() <= {*(f"config.{name}" for name in FIELDS), "input_embeddings.rows"}
    for name, values in sampled.items():
        assert len(values) == (4 if parameters[name].dim() == 2 else 2)
        flat = parameters[name].detach().flatten()
        assert (values[0], values[-1]) == pytest.approx((flat[0].item(), flat[-1].item()), rel=1e-5)
    assert json.loads(json.dumps(found)) == found
    check_fingerprint(base, found)


def test_spread_over_the_whole_depth_to_pooler_and_head():
    found = fingerprint(make_model("bert", num_hidden_layers=6))
    blocks = {name.split(".")[3] for name in found if ".layer." in name}
    assert "bert.embeddings.word_embeddings.weight" in found
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(found)
    assert len(blocks) >= 4


@pytest.mark.parametrize("case", CASES)
def test_wrapping_changes_nothing(case):
    found = fingerprint(make_model(case))
    model = make_badge(case, placement="ffn", final_exit="exit")
    assert fingerprint(model.get_base_model()) == found
    check_fingerprint(model.get_base_model(), found)


def test_head_that_is_saved_with_the_adapter_may_differ():
    model = make_badge(train_head=True)
    assert "classifier.weight" not in model.peft_config["default"].base_fingerprint
    assert "bert.pooler.dense.weight" in model.peft_config["default"].base_fingerprint
    model = make_badge(modules_to_save=["pooler"])
    assert "bert.pooler.dense.weight" not in model.peft_config["default"].base_fingerprint
    model = make_badge(train_head=False)
    assert "classifier.weight" in model.peft_config["default"].base_fingerprint
    model = make_badge(final_exit="exit")
    assert not {"classifier.weight", "bert.pooler.dense.weight"} & set(model.peft_config["default"].base_fingerprint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_precision_is_the_same_model(dtype):
    for scale in (0.02, 0.5):
        base = make_model(initializer_range=scale)
        found = fingerprint(base)
        check_fingerprint(copy.deepcopy(base).to(dtype), found)
        check_fingerprint(base, fingerprint(copy.deepcopy(base).to(dtype)))


LACKING = "{}.*drew it at random.*final_exit='exit'"


@pytest.mark.parametrize(
    ("end", "by", "message"),
    [
        ("", 2e-4, "another backbone"),  # as a hundred steps at a learning rate of 2e-5 do
        *((name, 0.02, LACKING.format(name)) for name in ("bert.pooler.dense.weight", "classifier.weight")),
        # as BitFit trains them
        *((kind, 0.05, f"the weight .*{kind}") for kind in ("bias", "LayerNorm.weight", "query.bias")),
    ],
)
def test_a_little_training_makes_another_model(end, by, message):
    base = make_model(initializer_range=0.02)
    found = fingerprint(base)
    with pytest.raises(ValueError, match="another backbone"):  # nor is one of another shape it
        check_fingerprint(base, {name: values[:3] for name, values in found.items()})
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(end):
                parameter.add_(by * torch.randn_like(parameter))
    with pytest.raises(ValueError, match=message):
        check_fingerprint(base, found)


@pytest.mark.parametrize("targets", [["query", "value"], ["key"], ["output.dense"]], ids="+".join)
def test_a_merged_lora_makes_another_model(targets):
    model = get_peft_model(make_model(num_hidden_layers=6), LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = fingerprint(model.merge_and_unload(), skip=("classifier",))
    with pytest.raises(ValueError, match="a LoRA had been merged into it before the exits were trained: merge it"):
        check_fingerprint(make_model(num_hidden_layers=6), found)


def test_what_cannot_be_compared_is_left_out():
    base = make_model()
    found = fingerprint(base)
    check_fingerprint(base, {**found, "name.of.another.version": [1.0, 2.0, 3.0, 4.0]})
    empty = copy.deepcopy(base).to("meta")
    assert fingerprint(empty) == {}
    check_fingerprint(empty, found)


def test_small_whatever_the_model():
    assert len(json.dumps(fingerprint(make_model(num_hidden_layers=12)))) < 2500


@pytest.mark.parametrize(("name", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 1e-5)])
def test_another_activation_or_epsilon_makes_another_model(name, value) -> None:
    found = fingerprint(make_model())
    with pytest.raises(ValueError, match=f"its config has {name}={value!r} here and"):
        check_fingerprint(make_model(**{name: value}), found)


def test_a_vocabulary_that_has_grown_is_the_same_model() -> None:
    base = make_model()
    found = fingerprint(base)
    base.resize_token_embeddings(107, mean_resizing=False)
    check_fingerprint(base, found)
    base.resize_token_embeddings(90)
    with pytest.raises(ValueError, match=r"the weight bert\.embeddings\.word_embeddings\.weight"):
        check_fingerprint(base, found)


def test_a_sample_of_an_earlier_version_is_compared_as_it_was_made() -> None:
    base = make_model()
    found = {name: values for name, values in fingerprint(base).items() if len(values) == 4}
    check_fingerprint(base, found)
    with pytest.raises(ValueError, match="another backbone"):
        check_fingerprint(make_model(seed=1), found)


def test_a_very_large_weight_is_sampled_to_its_last_value() -> None:
    # 250,037 words of 384 numbers: a float32 cannot count that far
    assert _sample(torch.ones(1).expand(250_037 * 384), 4) == [1.0] * 4
