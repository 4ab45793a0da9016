"""`backbone="lora"`: one adapter whose LoRA, bypasses and exits are made, saved, switched and taken out together."""

from __future__ import annotations

import copy
import json
import re
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from badge_peft import ARCHITECTURES, BadgeConfig
from badge_peft.tuner.adapter_file import CONFIG_TENSOR
from badge_peft.tuner.config_rules import lora_fields
from badge_peft.tuner.lora import lora_layers
from tests.labels import label
from tests.models import (
    BLOCKS,
    CASES,
    blocks_of,
    crossed,
    exits_of,
    make_badge,
    make_batch,
    make_labels,
    make_model,
    shake,
)

BATCH = make_batch()
LORA = {"r": 2, "lora_alpha": 3}


def make_lora(case="bert", base=None, lora=None, adapter_name="default", **fields):
    """As `make_badge`, with a LoRA that is as if trained."""
    base = make_model(case) if base is None else base
    torch.manual_seed(4)
    model = make_badge(case, base, adapter_name, backbone="lora", lora=LORA if lora is None else lora, **fields)
    shake(model, only=".lora_")
    return model


def plain_names(model):
    """Names of modules and tensors, as the base model had them."""
    return [name for name, _ in model.named_modules()], list(model.state_dict())


def targets_of(model):
    """Short names of the modules with a LoRA."""
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoraLayer)})


# ------------------------------------------------------------------------------------------------------ every backbone


@pytest.mark.parametrize("case", CASES)
def test_default_lora_sits_in_each_block_and_starts_as_nothing(case):
    base = make_model(case)
    with torch.no_grad():
        expected = base(**BATCH).logits
    model = get_peft_model(base, BadgeConfig(r=4, backbone="lora", train_head=False)).eval()
    layout = ARCHITECTURES[base.config.model_type]
    for block in blocks_of(model):
        found = {name: m for name, m in block.base_layer.named_modules() if isinstance(m, LoraLayer)}
        assert len(found) == len(layout.lora_targets)
        for target in layout.lora_targets:
            assert sum(name.endswith(target) for name in found) == 1
        for layer in found.values():
            assert (layer.r, layer.lora_alpha) == ({"default": 8}, {"default": 16})
            assert layer.lora_dropout["default"].p == 0.05
    assert len(lora_layers(model)) == len(blocks_of(model)) * len(layout.lora_targets)
    assert torch.equal(exits_of(model, BATCH)[:, -1], expected)


@pytest.mark.parametrize(("case", "placement"), crossed(CASES, ["block", "mhsa"]))
def test_it_is_the_model_with_the_products_added_to_its_weights(case, placement):
    """W + (alpha / r) B A in place of W, written down by hand, gives every exit."""
    base = make_model(case).double()
    plain = copy.deepcopy(base)
    lora = {**LORA, "target_modules": "all-linear"}  # the feed-forward part, too, which `mhsa` runs once more
    model = make_lora(case, base, lora, placement=placement, final_exit="exit").double()
    assert len(lora_layers(model)) >= 3 * len(blocks_of(model))
    changed = 0
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight
            plain.get_submodule(name.replace(".base_layer", "")).weight.data += 3 / 2 * product
            changed += 1
    assert changed == len(lora_layers(model))
    frozen = make_badge(case, plain, placement=placement, final_exit="exit").double()
    ours = {name: p for name, p in model.state_dict().items() if ".badge_" in name}
    assert set(ours) <= set(frozen.state_dict())
    frozen.load_state_dict(ours, strict=False)
    torch.testing.assert_close(exits_of(model, BATCH), exits_of(frozen, BATCH), rtol=1e-9, atol=1e-9)
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(model(**BATCH).logits, exits_of(frozen, BATCH)[:, -1])


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_lora_bypasses_and_exits_and_nothing_else(case):
    model = make_lora(case, train_head=False, final_exit="exit", exit_dropout=0.0).train()
    model(**BATCH, labels=make_labels()).loss.backward()
    ours = {name for name, _ in model.named_parameters() if ".badge_" in name or ".lora_" in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == ours
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == ours
    assert sum(".lora_" in name for name in ours) == 2 * len(lora_layers(model))


@pytest.mark.parametrize("case", CASES)
def test_the_base_model_is_given_back(case):
    base = make_model(case)
    with torch.no_grad():
        expected = base(**BATCH).logits
    names = plain_names(base)
    model = make_lora(case, base)
    exits = exits_of(model, BATCH)
    assert not torch.allclose(exits[:, -1], expected)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**BATCH).logits, expected)
    assert torch.equal(exits_of(model, BATCH), exits)
    with torch.no_grad():
        unloaded = model.unload()
        assert torch.equal(unloaded(**BATCH).logits, expected)
    assert plain_names(unloaded) == names
    again = make_lora(case, unloaded)
    assert torch.equal(exits_of(again, BATCH), exits)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("lora", "targets", "layers"),
    [
        ({"target_modules": ["key"]}, ["key"], BLOCKS),
        ({"target_modules": {"key", "dense"}}, ["dense", "key"], 4 * BLOCKS),
        ({"target_modules": ["attention.output.dense"]}, ["dense"], BLOCKS),
        ({"target_modules": ["encoder.layer.1.attention.self.key"]}, ["key"], 1),
        ({"target_modules": r".*layer\.[02]\.intermediate\.dense"}, ["dense"], 2),
        ({"target_modules": "all-linear"}, ["dense", "key", "query", "value"], 6 * BLOCKS),
        (
            {"target_modules": r".*(query|dense)", "exclude_modules": r".*output\.dense"},
            ["dense", "query"],
            2 * BLOCKS,
        ),
    ],
    ids=label,
)
def test_target_modules(lora, targets, layers):
    model = make_lora(lora={**LORA, **lora})
    assert targets_of(model) == targets
    assert len(lora_layers(model)) == layers
    inside = {id(layer) for block in blocks_of(model) for layer in lora_layers(block)}
    assert {id(layer) for layer in lora_layers(model)} == inside  # `dense` is in the pooler, too


def test_ranks_by_pattern_and_scaling():
    model = make_lora(lora={"r": 4, "lora_alpha": 8, "rank_pattern": {"value": 2}, "use_rslora": True})
    ranks = {name.rpartition(".")[2]: m.r["default"] for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert ranks == {"query": 4, "value": 2}
    scales = {layer.r["default"]: layer.scaling["default"] for layer in lora_layers(model)}
    assert scales == pytest.approx({4: 8 / 4**0.5, 2: 8 / 2**0.5})


def test_dora(tmp_path):
    model = make_lora(lora={**LORA, "use_dora": True}, train_head=False)
    magnitudes = [p for name, p in model.named_parameters() if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 2 * BLOCKS
    model.train()(**BATCH, labels=make_labels()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in magnitudes)
    before = exits_of(model.eval(), BATCH)
    model.save_pretrained(tmp_path)
    assert torch.equal(exits_of(PeftModel.from_pretrained(make_model(), tmp_path, adapter_name="x"), BATCH), before)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**BATCH).logits, make_model()(**BATCH).logits)


@pytest.mark.parametrize(
    "value", [LoraConfig(), LoraConfig(r=8), {}, {"r": 8}, {"target_modules": ["query"]}], ids=label
)
def test_a_lora_that_is_given_has_pefts_defaults_and_not_ours(value):
    for layer in lora_layers(make_badge(backbone="lora", lora=value)):
        assert (layer.r, layer.lora_alpha) == ({"default": 8}, {"default": LoraConfig().lora_alpha})
        assert not isinstance(layer.lora_dropout["default"], nn.Dropout)


@pytest.mark.parametrize(
    "value",
    [None, LORA, LoraConfig(r=4, target_modules=["key", "query"], use_dora=True, lora_dropout=0.2), {}],
    ids=label,
)
def test_the_config_survives_json_and_a_dict_is_as_good(value, tmp_path):
    config = BadgeConfig(backbone="lora", lora=value)
    assert BadgeConfig(backbone="lora", lora=config.lora and dict(config.lora)).lora == config.lora
    config.save_pretrained(tmp_path)
    read = BadgeConfig.from_pretrained(tmp_path)
    assert read.lora == config.lora == lora_fields(value)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora"] == config.lora
    first, second = (make_badge(backbone="lora", lora=x.lora) for x in (config, read))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert [x.scaling for x in lora_layers(first)] == [x.scaling for x in lora_layers(second)]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (3, "lora=3 is not allowed: it must be a LoraConfig, a dict of its fields, or None"),
        ({"rank": 4}, "lora=.*rank"),
        *(({"r": value}, f"lora r={value!r} is not allowed") for value in (0, "8")),
        *(({"lora_alpha": value}, f"lora lora_alpha={value!r}.*is not allowed") for value in (float("nan"), "16")),
        *(({"lora_dropout": value}, f"lora_dropout={value!r} is not allowed") for value in ("0.1", 2)),
        (
            {"target_modules": ["no_such_module"]},
            "target_modules=.*no_such_module.*match no module inside of the blocks",
        ),
        ({"target_modules": ["classifier"]}, "target_modules=.*classifier.*match no module inside of the blocks"),
        ({"bias": "all"}, "lora bias='all' is not allowed"),
        ({"modules_to_save": ["pooler"]}, r"lora modules_to_save=\['pooler'\] is not allowed.*BadgeConfig"),
        ({"layers_to_transform": [0]}, r"lora layers_to_transform=\[0\] is not allowed.*target_modules"),
        ({"target_parameters": ["x"]}, "lora target_parameters=.* is not allowed"),
        ({"trainable_token_indices": [1]}, "lora trainable_token_indices=.* is not allowed"),
        ({"alora_invocation_tokens": [1, 2]}, r"lora alora_invocation_tokens=\[1, 2\] is not allowed"),
        ({"init_lora_weights": "pissa"}, "lora init_lora_weights='pissa' is not allowed"),
        ({"init_lora_weights": "olora"}, "lora init_lora_weights='olora' is not allowed"),
    ],
    ids=label,
)
def test_bad_values(lora, message):
    model = make_badge()
    before = exits_of(model, BATCH)
    for build in (
        lambda: get_peft_model(make_model(), BadgeConfig(backbone="lora", lora=lora)),
        lambda: model.add_adapter("other", BadgeConfig(backbone="lora", lora=lora)),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    assert list(model.peft_config) == ["default"] and not lora_layers(model)
    assert torch.equal(exits_of(model, BATCH), before)


@pytest.mark.parametrize("backbone", ["frozen", "full"])
def test_a_lora_for_another_backbone_mode(backbone):
    with pytest.raises(ValueError, match=f"lora is set but backbone='{backbone}': set backbone='lora'"):
        BadgeConfig(backbone=backbone, lora={"r": 4})


# ----------------------------------------------------------------------------------------------------- saving, loading


KEYS = {
    "bert": [
        f"bert.encoder.layer.{i}.base_layer.attention.self.{n}" for i in range(BLOCKS) for n in ("query", "value")
    ],
    "albert": [
        f"albert.encoder.albert_layer_groups.0.albert_layers.0.base_layer.attention.{n}" for n in ("query", "value")
    ],
    "modernbert-cls": [f"model.layers.{i}.base_layer.attn.Wqkv" for i in range(BLOCKS)],
}


@pytest.mark.parametrize("name", ["default", "other", "a-b_c", "lora"])
@pytest.mark.parametrize("case", KEYS)
def test_exactly_these_keys_are_saved(case, name, tmp_path):
    model = make_lora(case, adapter_name=name, train_head=False)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    found = load_file(folder / "adapter_model.safetensors")
    lora = {f"base_model.model.{key}.lora_{half}.weight" for key in KEYS[case] for half in "AB"}
    assert {key for key in found if ".lora_" in key} == lora
    rest = {key for key in found if ".lora_" not in key}
    ours = rest - {CONFIG_TENSOR}
    assert ours and all(re.search(r"\.badge_(bypass|exit)\.\d\.", key) for key in ours)
    frozen = make_badge(case, train_head=False)
    frozen.save_pretrained(tmp_path / "frozen")
    assert rest == set(load_file(tmp_path / "frozen" / "adapter_model.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_under_other_names(case, tmp_path):
    model = make_lora(case, adapter_name="first", final_exit="exit", placement="ffn")
    before = exits_of(model, BATCH)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(case), tmp_path / "first", adapter_name="second")
    assert torch.equal(exits_of(loaded, BATCH), before)
    assert not any(p.requires_grad for p in loaded.parameters())
    beside = make_lora(case, lora={"r": 5, "target_modules": "all-linear"}, adapter_name="one")
    own = exits_of(beside, BATCH)
    beside.load_adapter(tmp_path / "first", "two")
    assert torch.equal(exits_of(beside, BATCH), own)
    beside.set_adapter("two")
    assert torch.equal(exits_of(beside, BATCH), before)
    beside.save_pretrained(tmp_path / "again", selected_adapters=["two"])
    first, again = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("first", "again/two"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def test_two_of_them_adapt_every_linear_layer(tmp_path):
    """The second finds the first's LoRA in the modules that it adapts."""
    model = make_lora(lora={**LORA, "target_modules": "all-linear"})
    expected = exits_of(model, BATCH)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    assert torch.equal(exits_of(model, BATCH), expected)
    model.set_adapter("second")
    assert torch.equal(exits_of(model.eval(), BATCH), expected)


# ---------------------------------------------------------------------------------------------------- several adapters


def four(case="bert", tmp_path=None):
    """A model with four adapters, and the exits of each when it is alone."""
    kinds = {
        "one": {"backbone": "lora", "lora": LORA},
        "none": {},
        "two": {"backbone": "lora", "lora": {"r": 3, "target_modules": ["dense", "Wo", "query"]}, "placement": "mhsa"},
        "three": {"backbone": "lora", "lora": {"r": 2, "use_dora": True}, "final_exit": "exit"},
    }
    model, alone = None, {}
    for seed, (name, fields) in enumerate(kinds.items(), start=10):
        single = make_badge(case, adapter_name=name, **{"r": 3, **fields})
        shake(single, seed, only=".lora_")
        single.save_pretrained(tmp_path)
        alone[name] = exits_of(single, BATCH)
        if model is None:
            model = PeftModel.from_pretrained(make_model(case), tmp_path / name, name, is_trainable=True).eval()
        else:
            model.load_adapter(tmp_path / name, name, is_trainable=True)
    return model.eval(), alone


@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-cls"])
def test_switching(case, tmp_path):
    model, alone = four(case, tmp_path)
    assert all(not torch.allclose(alone["none"][:, -1], alone[name][:, -1]) for name in ("one", "two", "three"))
    for name in ("one", "none", "three", "two", "one", "three", "none"):
        model.set_adapter(name)
        assert torch.equal(exits_of(model, BATCH), alone[name])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        trained = {n for n in trained if ".modules_to_save." not in n}  # those are PEFT's affair
        assert all(f".{name}." in n or n.endswith(f".{name}") for n in trained)
        assert any(".lora_" in n for n in trained) == (name != "none")
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(model(**BATCH).logits, make_model(case)(**BATCH).logits)
        assert torch.equal(exits_of(model, BATCH), alone[name])


@pytest.mark.parametrize("active", ["one", "two"])
def test_deleting(active, tmp_path):
    model, alone = four(tmp_path=tmp_path)
    model.set_adapter(active)
    with pytest.warns(UserWarning, match="now deleted") if active == "one" else nullcontext():
        model.delete_adapter("one")
    assert not any("one" in name.split(".") for name in model.state_dict())
    assert all("one" not in layer.r for layer in lora_layers(model))
    for name in ("two", "none", "three"):
        model.set_adapter(name)
        assert torch.equal(exits_of(model, BATCH), alone[name])
    model.delete_adapter("two")
    model.load_adapter(tmp_path / "one", "two")  # the name is free again
    model.set_adapter("two")
    assert torch.equal(exits_of(model, BATCH), alone["one"])


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"])
def test_names_that_lora_has_taken(name):
    with pytest.raises(ValueError, match=f"an adapter cannot be called '{name}'"):
        make_lora(adapter_name=name)


def test_a_name_that_starts_as_those_of_lora_do(tmp_path):
    model = make_lora(adapter_name="lora_v1")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "lora_v1")
    assert torch.equal(exits_of(loaded, BATCH), exits_of(model, BATCH))


@pytest.mark.parametrize("training", [False, True])
def test_a_new_lora_is_in_the_mode_of_its_model(training):
    model = get_peft_model(make_model("bert").train(training), BadgeConfig(backbone="lora"))
    layers = lora_layers(model)
    assert layers and {layer.training for layer in layers} == {training}
    assert {layer.lora_dropout["default"].training for layer in layers} == {training}
