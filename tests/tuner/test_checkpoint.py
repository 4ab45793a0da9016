from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, load_pretrained
from badge_peft.tuner.adapter_file import CONFIG_TENSOR
from tests import reference
from tests.models import (
    CASES,
    blocks_of,
    crossed,
    exits_of,
    make_badge,
    make_batch,
    make_model,
    shake,
    trained,
)

FILE = "adapter_model.safetensors"


def saved_base(path: Path, case: str = "bert", **changes: Any) -> Any:
    """A base model that has a folder to be loaded from, as every real one has."""
    make_model(case, **changes).save_pretrained(path)
    return AutoModelForSequenceClassification.from_pretrained(path).eval()


def other_base(seed: int = 0, **changes: Any) -> Any:
    return make_model("bert", seed=seed, **changes)


# ---- what loading depends on (that every way of loading gives the same answers: tests/peft_verbs)


def encoder_only(path: Path, case: str, drop_pooler: bool = False) -> Any:
    """A checkpoint as pre-training leaves it: without a head, and some without a pooler; loading draws them."""
    encoder = make_model(case).base_model
    if drop_pooler:
        encoder.pooler = None
    encoder.save_pretrained(path)
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=5).eval()


@pytest.mark.parametrize(
    ("case", "fields"),
    crossed(
        ["bert", "albert", "distilbert", "roberta", "deberta-v2", "modernbert-mean"],
        [{}, {"final_exit": "exit"}, {"backbone": "full"}],
    ),
    ids=str,
)
def test_new_head_on_a_pretrained_encoder(case, fields, tmp_path):
    model = trained(base=encoder_only(tmp_path / "base", case), **fields)
    expected = exits_of(model, make_batch())
    assert expected.shape[-1] == 5
    model.save_pretrained(tmp_path / "adapter")
    for loaded in (
        load_pretrained(str(tmp_path / "adapter")),
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=5),
    ):
        assert torch.equal(exits_of(loaded.eval(), make_batch()), expected)
    if not fields:
        with pytest.raises(ValueError, match="num_labels=5, but the model's head has 3: load .* num_labels=5"):
            AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("fields", "works"),
    [
        ({}, False),
        ({"train_head": False}, False),
        ({"final_exit": "exit"}, True),
        ({"modules_to_save": ["pooler"]}, True),
        ({"backbone": "full"}, True),
    ],
    ids=str,
)
def test_pooler_that_the_checkpoint_lacks(fields, works, tmp_path):
    """Nobody could load what was trained on a random pooler that is not saved: say so, and do not answer at chance."""
    model = trained(base=encoder_only(tmp_path / "base", "bert", drop_pooler=True), **fields)
    model.save_pretrained(tmp_path / "adapter")
    if works:
        loaded = load_pretrained(str(tmp_path / "adapter"))
        assert torch.equal(exits_of(loaded, make_batch()), exits_of(model, make_batch()))
    else:
        with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.weight.*drew it at random"):
            load_pretrained(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-cls"])
@pytest.mark.parametrize("fields", [{"placement": "ffn"}, {"backbone": "full"}, {"backbone": "lora"}], ids=str)
def test_copies_work_and_are_apart(how, case, fields):
    model = trained(case, **fields)
    expected = exits_of(model, make_batch())
    copied = how(model)
    assert torch.equal(exits_of(copied, make_batch()), expected)
    shake(copied, only="")
    assert not torch.allclose(exits_of(copied, make_batch()), expected)
    assert torch.equal(exits_of(model, make_batch()), expected)
    base = copied.unload()  # the copy's hooks are its own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(exits_of(model, make_batch()), expected)


# ---- what a file holds


def block_keys(numbers: range | list[int], parts: tuple[str, ...], kind: str) -> set[str]:
    return {f"base_model.model.bert.encoder.layer.{m - 1}.badge_{kind}.{m}.{part}" for m in numbers for part in parts}


BYPASS = ("down.weight", "up.weight", "norm.weight", "norm.bias")
EXIT = ("linear.weight", "linear.bias")
HEAD = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({}, block_keys([1, 2], BYPASS, "bypass") | block_keys([1, 2], EXIT, "exit") | HEAD),
        ({"train_head": False}, block_keys([1, 2], BYPASS, "bypass") | block_keys([1, 2], EXIT, "exit")),
        (
            {"final_exit": "exit", "bias": True},
            block_keys([1, 2, 3], (*BYPASS, "down.bias", "up.bias"), "bypass") | block_keys([1, 2, 3], EXIT, "exit"),
        ),
        (
            {"placement": "none", "exit_type": "pooled", "exit_layers": [2]},
            block_keys([2], (*EXIT, "dense.weight", "dense.bias"), "exit") | HEAD,
        ),
        (
            {"exit_layers": [0, 2]},
            {f"base_model.model.bert.encoder.layer.0.badge_exit.0.{part}" for part in EXIT}
            | block_keys([2], BYPASS, "bypass")
            | block_keys([2], EXIT, "exit")
            | HEAD,
        ),
    ],
    ids=["own", "untrained-head", "exit-bias", "none-pooled", "exit-0"],
)
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_exact_keys(fields, keys, adapter_name, tmp_path):
    model = make_badge(adapter_name=adapter_name, **fields)
    model.add_adapter("third", BadgeConfig(placement="ffn", bias=True, final_exit="exit"))
    model.save_pretrained(tmp_path, selected_adapters=[adapter_name])
    path = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    assert set(load_file(path / FILE)) == {*keys, CONFIG_TENSOR}
    assert {p.name for p in path.iterdir()} - {"README.md"} == {"adapter_config.json", FILE}
    assert (tmp_path / "README.md").exists()


def test_exact_keys_of_a_shared_block(tmp_path):
    make_badge("albert", final_exit="exit").save_pretrained(tmp_path)
    root = "base_model.model.albert.encoder.albert_layer_groups.0.albert_layers.0"
    expected = {f"{root}.badge_bypass.{m}.{part}" for m in (1, 2, 3) for part in BYPASS}
    expected |= {f"{root}.badge_exit.{m}.{part}" for m in (1, 2, 3) for part in EXIT}
    assert set(load_file(tmp_path / FILE)) == {*expected, CONFIG_TENSOR}


@pytest.mark.parametrize("case", CASES)
def test_trained_backbone_is_in_the_file_once(case, tmp_path):
    model = trained(case, backbone="full")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE)
    del stored[CONFIG_TENSOR]
    own = {name for name in stored if ".badge_" in name}
    names = {f"base_model.model.{name}" for name in make_model(case).state_dict()}
    assert {name.replace(".base_layer.", ".") for name in stored if name not in own} == names
    assert len(stored) == len(own) + len(names)


def test_config_holds_what_loading_needs(tmp_path):
    make_badge(base=saved_base(tmp_path / "base"), exit_layers=[1, 2]).save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tmp_path / "base")
    assert (stored["num_labels"], stored["hidden_size"], stored["num_blocks"]) == (3, 32, 3)
    assert stored["exit_layers"] == [1, 2] and stored["inference_mode"] is True
    assert stored["peft_type"] == "BADGE" and stored["base_fingerprint"]


# ---- the trained backbone


@pytest.mark.parametrize("case", ["bert", "albert", "deberta-v2", "modernbert-mean"])
@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
def test_trained_backbone_comes_back_bit_for_bit(case, final_exit, tmp_path):
    model = trained(case, backbone="full", final_exit=final_exit)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        out = model(**make_batch())
    loaded = PeftModel.from_pretrained(make_model(case), tmp_path).eval()
    expected = model.get_base_model().state_dict()
    assert expected.keys() == loaded.get_base_model().state_dict().keys()
    assert all(torch.equal(expected[name], value) for name, value in loaded.get_base_model().state_dict().items())
    unloaded = loaded.unload()
    assert unloaded.state_dict().keys() == make_model(case).state_dict().keys()
    start = make_model(case).state_dict()
    same = {name for name, p in unloaded.named_parameters() if torch.equal(p, start[name])}
    frozen = {name for name, p in model.get_base_model().named_parameters() if not p.requires_grad}
    frozen = {name.replace(".base_layer.", ".") for name in frozen if ".original_module." not in name}
    assert same == frozen and bool(frozen) == (final_exit == "exit")  # what no exit reads is not trained
    with torch.no_grad():
        logits = unloaded(**make_batch()).logits
        assert not torch.equal(logits, make_model(case)(**make_batch()).logits)
    if final_exit == "base_head":
        assert torch.equal(logits, out.logits)


def test_trained_backbone_ignores_the_weights_of_its_base(tmp_path):
    """The file holds the whole backbone, so it does not matter which weights it is put on."""
    model = trained(backbone="full")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(seed=5), tmp_path).eval()
    assert torch.equal(exits_of(loaded, make_batch()), exits_of(model, make_batch()))


@pytest.mark.parametrize(("first", "second"), [("full", "frozen"), ("frozen", "full"), ("full", "full")])
def test_trained_backbone_has_its_model_to_itself(first, second, tmp_path):
    model = make_badge(backbone=first)
    before = exits_of(model, make_batch())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="backbone='full' .* alone on its model: put 'second' on another copy"):
        model.add_adapter("second", BadgeConfig(backbone=second))
    make_badge(backbone=second).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="alone on its model"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(exits_of(model, make_batch()), before)


# ---- files that do not fit


def refused(model_or_base: Any, load: Any, message: str) -> None:
    """`load` raises, and the model answers as before."""
    with torch.no_grad():
        before = model_or_base(**make_batch()).logits
    with pytest.raises(ValueError, match=message):
        load()
    with torch.no_grad():
        assert torch.equal(model_or_base(**make_batch()).logits, before)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: other_base(seed=1), "made for another backbone: the weight bert"),
        (lambda: other_base(hidden_size=64), "hidden_size=32, but the model has hidden_size=64"),
        (lambda: other_base(num_hidden_layers=4), "num_blocks=3, but the model has num_blocks=4"),
        (
            lambda: other_base(num_labels=2),
            # beside other tasks it may have labels of its own, but these models have other weights as well
            "num_labels=3, but the model's head has 2: load the model with num_labels=3|made for another backbone",
        ),
        (lambda: make_model("roberta"), "another architecture: the blocks .* this RobertaForSequenceClassification"),
        (lambda: make_model("modernbert-cls"), "made for another architecture"),
    ],
    ids=["weights", "hidden_size", "blocks", "labels", "roberta", "modernbert"],
)
def test_adapter_of_another_model(base, message, tmp_path):
    make_badge().save_pretrained(tmp_path)
    fresh = base()
    refused(fresh, lambda: PeftModel.from_pretrained(fresh, tmp_path), message)
    assert not blocks_of(fresh) and not hasattr(fresh, "peft_config")
    model = make_badge(base=fresh)
    refused(model, lambda: model.load_adapter(tmp_path, "second"), message)
    assert list(model.peft_config) == ["default"]


def untouched(base: Any) -> None:
    """`base` is as `make_model()` gave it: no wrapper, no hook, no config, and what was trainable still is."""
    fresh = make_model()
    assert repr(base) == repr(fresh) and not hasattr(base, "peft_config")
    assert list(base.state_dict()) == list(fresh.state_dict())
    assert [p.requires_grad for p in base.parameters()] == [p.requires_grad for p in fresh.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def without(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


def lose_a_tensor(folder: Path, part: str = "badge_exit") -> dict[str, Tensor]:
    """Takes the first tensor with `part` in its name out of the file; all that were in it."""
    weights = in_memory(folder / FILE)
    save_file(without(next(name for name in weights if part in name), weights), folder / FILE)
    return weights


@pytest.mark.parametrize(
    "fields",
    [{}, {"final_exit": "exit", "exit_type": "pooled"}, {"backbone": "full"}, {"backbone": "lora"}],
    ids=["head", "exit", "full", "lora"],
)
def test_file_that_lacks_any_tensor(fields, tmp_path):
    """Loaded all the same, an exit or the head would keep random weights and answer at chance."""
    model = make_badge(base=make_model(num_hidden_layers=2), **fields)
    model.save_pretrained(tmp_path)
    weights = in_memory(tmp_path / FILE)
    del weights[CONFIG_TENSOR]
    for name in weights:
        save_file(without(name, weights), tmp_path / FILE)
        base = make_model(num_hidden_layers=2)
        load = partial(PeftModel.from_pretrained, base, tmp_path)
        refused(base, load, "lacks 1 of .* tensors, first")
    save_file({}, tmp_path / FILE)
    with pytest.raises(ValueError, match=f"lacks {len(weights)} of {len(weights)} tensors"):
        PeftModel.from_pretrained(make_model(num_hidden_layers=2), tmp_path)


@pytest.mark.parametrize("part", ["badge_exit.1.linear.bias", "classifier.weight"])
@pytest.mark.parametrize("fields", [{}, {"train_head": False}, {"backbone": "lora"}], ids=str)
def test_an_adapter_whose_file_is_damaged_is_not_added(fields, part, tmp_path):
    kept = make_badge()
    kept.save_pretrained(tmp_path)
    weights = lose_a_tensor(tmp_path, part)
    model = trained(**fields)
    before = set(model.state_dict())
    refused(model, lambda: model.load_adapter(tmp_path, "second"), "lacks 1 of")
    assert model.active_adapter == "default" and list(model.peft_config) == ["default"]
    assert {key.replace(".original_module", "") for key in model.state_dict()} == {
        key.replace(".original_module", "") for key in before
    }
    save_file(weights, tmp_path / FILE)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(exits_of(model.eval(), make_batch()), exits_of(kept, make_batch()))
    lose_a_tensor(tmp_path, part)
    model.set_adapter("default")
    refused(model, lambda: model.load_adapter(tmp_path, "second"), "lacks 1 of")  # that one was there before
    assert list(model.peft_config) == ["default", "second"]


MISFITS: list[Any] = [
    ({"max_exit": 99}, "max_exit=99 is not allowed: the model has 3 blocks"),
    ({"policy": "fixed_depth", "depth": 7}, "depth=7 is not allowed"),
    ({"threshold": [0.1, 0.2]}, "threshold has 2 numbers, but there are 3 exits"),
    ({"policy": "agreement"}, "has to be fitted first"),
    ({"policy": "top_k", "parameters": {"margins": [1.0] * 3}}, "the model has 3 outputs"),
    ({"policy": "learned"}, "needs an adapter with an LTE layer"),
]


@pytest.mark.parametrize(("rule", "message"), MISFITS, ids=str)
def test_a_rule_that_the_exits_cannot_follow(rule, message, tmp_path):
    """The first call would refuse it, when the adapter is in production."""
    model = make_badge()
    model.save_pretrained(tmp_path)
    base = make_model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, BadgeConfig(early_exit=rule))
    untouched(base)
    edit_config(tmp_path, early_exit=rule)
    remedy = f"{message}.* early_exit in the adapter_config.json of .*: set it to null there"
    refused(base, lambda: PeftModel.from_pretrained(base, tmp_path), remedy)
    untouched(base)
    refused(model, lambda: model.load_adapter(tmp_path, "second"), remedy)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=message):
        model.set_early_exit_config(rule)
    assert model.config_of().early_exit is None
    edit_config(tmp_path, early_exit=None)
    model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default", "second"]


def edit_config(folder: Path, **fields: Any) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def in_memory(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that will be written over: older releases of safetensors leave them in it."""
    return {name: value.clone() for name, value in load_file(path).items()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def not_a_file_of_weights(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs")  # what a clone without the large files leaves


DAMAGE: list[Any] = [cut, not_a_file_of_weights, lambda path: path.write_bytes(b""), Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "pointer", "empty", "missing"])
@pytest.mark.parametrize("safe", [True, False])
def test_weights_that_cannot_be_read(damage, safe, tmp_path):
    """They are looked at before the model is changed, so the model is as it was, and the next try finds it so."""
    kept = trained()
    kept.save_pretrained(tmp_path, safe_serialization=safe)
    file = tmp_path / (FILE if safe else "adapter_model.bin")
    whole = file.read_bytes()
    damage(file)
    message = "holds no weights of an adapter" if damage is Path.unlink else f"{file.name} cannot be read .*damaged"
    base, model = is_refused_on_both_ways(tmp_path, message)
    file.write_bytes(whole)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    for loaded in (model, PeftModel.from_pretrained(base, tmp_path)):
        assert torch.equal(exits_of(loaded.eval(), make_batch()), exits_of(kept, make_batch()))


def test_weights_of_an_earlier_saving_that_would_be_read_in_their_place(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    shake(model)
    with pytest.raises(ValueError, match=f"{FILE} is of an earlier saving, and PEFT would read it .*: take it away"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / FILE).unlink()
    model.save_pretrained(tmp_path, safe_serialization=False)
    shake(model, seed=5)
    for safe in (False, True):  # the file of the last saving is the one that is read
        model.save_pretrained(tmp_path, safe_serialization=safe)
        loaded = PeftModel.from_pretrained(make_model(), tmp_path)
        assert torch.equal(exits_of(loaded, make_batch()), exits_of(model, make_batch()))


def changed_file(path: Path, change: Any, **fields: Any) -> None:
    """An adapter in `path` whose tensors went through `change`."""
    trained(**fields).save_pretrained(path)
    weights = in_memory(path / FILE)
    change(weights)
    save_file(weights, path / FILE)


def is_refused_on_both_ways(path: Path, message: str) -> tuple[Any, Any]:
    """The base model and the model with another adapter that have refused what is in `path`."""
    base = make_model()
    for is_trainable in (False, True):
        refused(base, partial(PeftModel.from_pretrained, base, path, is_trainable=is_trainable), message)
        untouched(base)
    model = trained(placement="ffn")
    names = list(model.state_dict())
    refused(model, lambda: model.load_adapter(path, "second"), message)
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == names
    return base, model


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.base_layer.attention.self.query.weight",
        "bert.embeddings.LayerNorm.bias",
        "bert.encoder.layer.0.badge_exit.3.linear.weight",
        "bert.encoder.layer.0.base_layer.attention.self.query.lora_A.weight",
        "anything",
    ],
)
def test_a_tensor_that_the_config_does_not_name_is_refused(name, tmp_path):
    """PEFT would write it over the base model's, for every adapter and for none."""
    changed_file(tmp_path, lambda weights: weights.update({f"base_model.model.{name}": torch.zeros(32, 32)}))
    is_refused_on_both_ways(tmp_path, r"has 1 tensors that its config does not name, first .*written over")


def writes_complex() -> bool:
    try:
        return bool(save({"x": torch.zeros(1, dtype=torch.complex64)}))
    except KeyError:
        return False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value * torch.nan, "values that are not finite numbers: its training has failed"),
        (lambda value: value / 0, "values that are not finite numbers"),
        (lambda value: value.long(), r"is torch.int64 in the adapter file; allowed is torch.float16"),
        pytest.param(
            lambda value: value.to(torch.complex64),
            r"is torch.complex64 in the adapter file",
            marks=pytest.mark.skipif(not writes_complex(), reason="this safetensors writes no complex numbers"),
        ),
        (lambda value: value.to(torch.float8_e4m3fn), r"is torch.float8_e4m3fn in the adapter file"),
        (lambda value: value[:2].clone(), r"has shape \[2.* in the adapter file and \[[34]"),
    ],
    ids=["nan", "inf", "int64", "complex", "float8", "shape"],
)
@pytest.mark.parametrize("part", ["badge_exit.1.linear.weight", "classifier.weight"])
def test_weights_of_another_kind_are_refused(change, message, part, tmp_path):
    def apply(weights: dict[str, Tensor]) -> None:
        name = next(name for name in weights if name.endswith(part))
        weights[name] = change(weights[name])

    changed_file(tmp_path, apply)
    is_refused_on_both_ways(tmp_path, message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read(dtype, tmp_path):
    changed_file(tmp_path, lambda weights: weights.update({k: v.to(dtype) for k, v in weights.items()}))
    with pytest.raises(ValueError, match="set weights_hash to null"):  # a file that was changed by hand
        PeftModel.from_pretrained(make_model(), tmp_path)
    edit_config(tmp_path, weights_hash=None)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    torch.testing.assert_close(exits_of(loaded, make_batch()), exits_of(trained(), make_batch()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("lora", [{"r": 3}, {"use_dora": True, "target_modules": ["query", "output.dense"]}], ids=str)
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_a_file_with_another_lora_is_refused(lora, part, tmp_path):
    def transpose(weights: dict[str, Tensor]) -> None:
        name = next(name for name in weights if name.endswith(part))
        weights[name] = weights[name].T.contiguous()

    changed_file(tmp_path, transpose, backbone="lora", lora=lora)
    is_refused_on_both_ways(tmp_path, r"has shape \[.*\] in the adapter file")


@pytest.mark.parametrize("fields", [{"r": 10**9}, {"backbone": "lora", "lora": {"r": 10**9}}], ids=["r", "lora"])
def test_a_size_in_the_config_is_compared_before_memory_is_taken(fields, tmp_path):
    trained(backbone=fields.get("backbone", "frozen")).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    is_refused_on_both_ways(tmp_path, r"in the adapter file and \[1000000000, 32\] here")


def test_a_file_without_a_fingerprint_is_compared_as_well(tmp_path):
    trained().save_pretrained(tmp_path)
    lose_a_tensor(tmp_path)
    edit_config(tmp_path, base_fingerprint=None)
    is_refused_on_both_ways(tmp_path, "lacks 1 of")


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_a_pickle_that_is_no_file_of_tensors_is_not_read(tmp_path, capsys):
    trained().save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    torch.save({"base_model.model.classifier.weight": Harmful()}, tmp_path / "adapter_model.bin")
    is_refused_on_both_ways(tmp_path, "adapter_model.bin cannot be read")
    torch.save(torch.zeros(3), tmp_path / "adapter_model.bin")
    is_refused_on_both_ways(tmp_path, "adapter_model.bin cannot be read")
    assert "code ran" not in capsys.readouterr().out


def test_an_adapter_whose_weights_never_came_does_not_answer(tmp_path):
    """`get_peft_model` with the config of a saved adapter makes new exits, which must not pass for the saved ones."""
    kept = trained()
    kept.save_pretrained(tmp_path)
    model = get_peft_model(make_model(), BadgeConfig.from_pretrained(tmp_path)).eval()
    for call in (model, model.early_exit_forward):
        with pytest.raises(ValueError, match=r"weights of adapter 'default' have never been loaded"):
            call(**make_batch())
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**make_batch()).logits, make_model()(**make_batch()).logits)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(exits_of(model.eval(), make_batch()), exits_of(kept, make_batch()))


def test_a_config_says_where_it_was_read_at_run_time_alone(tmp_path):
    trained().save_pretrained(tmp_path)
    config = BadgeConfig.from_pretrained(tmp_path)
    assert config.source is not None and config.source.path == str(tmp_path) and config.source.needs_weights
    assert "source" not in config.to_dict() and str(tmp_path) not in repr(config)
    model = PeftModel.from_pretrained(make_model(), tmp_path, config=config)
    assert model.peft_config["default"].source is None  # the weights are in
    assert config.source is not None  # and the caller's may be used again
    model.save_pretrained(tmp_path / "again")
    assert "source" not in json.loads((tmp_path / "again" / "adapter_config.json").read_text())


def test_a_config_alone_may_be_read_and_put_on_a_model(tmp_path):
    kept = make_badge(r=2)
    kept.peft_config["default"].save_pretrained(tmp_path)
    model = get_peft_model(make_model(), BadgeConfig.from_pretrained(tmp_path))
    model.add_adapter("second", BadgeConfig.from_pretrained(tmp_path))
    assert [config.r for config in model.peft_config.values()] == [2, 2]


@pytest.mark.parametrize("fields", [{}, {"backbone": "lora"}, {"backbone": "full"}], ids=str)
def test_a_base_model_whose_adapter_is_damaged_is_given_back(fields, tmp_path):
    kept = trained(**fields)
    kept.save_pretrained(tmp_path)
    weights = lose_a_tensor(tmp_path)
    base = make_model()
    refused(base, lambda: PeftModel.from_pretrained(base, tmp_path), "lacks 1 of")
    untouched(base)
    save_file(weights, tmp_path / FILE)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(exits_of(loaded, make_batch()), exits_of(kept, make_batch()))


def test_a_model_that_somebody_holds_keeps_its_adapter(tmp_path):
    kept = make_badge()
    kept.save_pretrained(tmp_path)
    weights = lose_a_tensor(tmp_path)
    config = BadgeConfig.from_pretrained(tmp_path)
    config.source = None  # start anew
    model = get_peft_model(make_model(), config).eval()
    refused(model, lambda: model.load_adapter(tmp_path, "default"), "lacks 1 of")
    save_file(weights, tmp_path / FILE)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(exits_of(model, make_batch()), exits_of(kept, make_batch()))


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{"placement": "ffn"}, {"backbone": "full"}], ids=str)
def test_half_precision_base(fields, dtype, tmp_path):
    model = trained(base=make_model().to(dtype), **fields)
    expected = exits_of(model, make_batch())
    assert model.get_base_model().dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model().to(dtype), tmp_path).eval()
    assert torch.equal(exits_of(loaded, make_batch()), expected)
    own: dict[str, Tensor] = reference.own_weights(loaded)
    assert all(p.dtype == torch.float32 for p in own.values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_weights_for_an_adapter_on_meta(low_cpu_mem_usage, tmp_path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    loaded = get_peft_model(make_model(), BadgeConfig(r=4), low_cpu_mem_usage=True).eval()
    loaded.load_adapter(str(tmp_path), "default", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not [name for name, p in loaded.named_parameters() if p.device.type == "meta"]
    assert torch.equal(exits_of(loaded, make_batch()), exits_of(model, make_batch()))
