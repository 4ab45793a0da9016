"""Files and answers of earlier commits against the code as it is now.

`data` was written by the code of commit b7d5fc6, `later` (exits that build on one another, one pooler for all exits,
tokens, decoders, many tasks in a pass, ranking) by that of 0b4ebac: once, by scripts that no later code can run
(`git show 5da8662:tests/stored/make.py`, and `make_later.py` beside it). All of it is safetensors and JSON:

    versions.json               of torch and the others, when this was made
    bases/<name>/               tiny random base models
    adapters/<name>/            an adapter as PEFT saves it; its card is left out
    answers/<name>.safetensors  the batch, full depth, and the logits of each early-exit call
    answers/<name>.json         the early-exit configs, the blocks at which rows stopped
    mixed.safetensors, .json    one call with `adapter_names`
    exits/<name>.safetensors    `ExitLogits`, and beside it what `sweep` and `calibrate` gave on them
    onnx/<name>/                exported models, with what they answered; so `later/tasks`, `later/ranking`

Where this machine computes the *base model* as the machine did that made the data (same torch, and base logits equal
bit for bit), full depth is compared bit for bit, and all that passes through compacted batches to 1e-6 of the largest
logit. Elsewhere float32 rounds in other places, so logits are computed in float64, which differs from the stored ones
by what those had rounded: the same on every machine, at most 4e-6 of the largest. Exits are compared exactly
everywhere, in float32: no row's decision hangs on less than 1e-4.
"""

from __future__ import annotations

import json
import shutil
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from badge_peft import EarlyExitConfig, ExitLogits, calibrate, early_exit_forward, load_pretrained, sweep
from badge_peft.early_exit.policies import POLICIES, build_policy
from badge_peft.tuner.adapter_file import CONFIG_TENSOR
from badge_peft.tuner.config_rules import REMOVED

HERE = Path(__file__).parent
DATA = HERE / "data"
ADAPTERS = sorted(f"{path.parts[-3]}/{path.name}" for path in HERE.glob("*/adapters/*"))
EXITS = sorted(path.stem for path in (DATA / "exits").glob("*.json"))
CLOSE = 1e-6
ROUNDED = 5e-6  # what float32 has lost in the stored logits
FITTED = 1e-3  # thresholds of `agreement`: its stored coefficients are where an optimizer had stopped


def read(*parts: str) -> Any:
    """A JSON file."""
    return json.loads(HERE.joinpath(*parts).read_text(encoding="utf-8"))


def tensors(*parts: str) -> dict[str, Tensor]:
    """A safetensors file."""
    return load_file(HERE.joinpath(*parts))


def load_base(folder: str, base: str) -> Any:
    """A base model, in eval mode."""
    kind = AutoModelForTokenClassification if base == "bert_tokens" else AutoModelForSequenceClassification
    return kind.from_pretrained(HERE / folder / "bases" / base).eval()


def load(*names: str) -> Any:
    """A PEFT model with these adapters of one base, in eval mode; one adapter is called `default`."""
    folder, first = names[0].split("/")
    base = load_base(folder, read(folder, "answers", f"{first}.json")["base"])
    as_ = {} if len(names) == 1 else {"adapter_name": first}
    model: Any = PeftModel.from_pretrained(base, str(HERE / folder / "adapters" / first), **as_)
    for name in (each.split("/")[1] for each in names[1:]):
        model.load_adapter(str(HERE / folder / "adapters" / name), adapter_name=name)
    return model.eval()


@cache
def loaded(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """(the PEFT model, its stored tensors, its stored facts)."""
    folder, own = name.split("/")
    return load(name), tensors(folder, "answers", f"{own}.safetensors"), read(folder, "answers", f"{own}.json")


def batch_of(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a call."""
    return {name: stored[name] for name in ("input_ids", "attention_mask")}


def assert_close(found: Tensor, wanted: Tensor, close: float | None = None) -> None:
    """Equal to the rounding of float32, or, for answers in float64, of what is stored."""
    close = close or (ROUNDED if found.dtype == torch.float64 else CLOSE)
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=close * max(1.0, wanted.abs().max().item()))


@cache
def computes_as_then(name: str) -> bool:
    """Whether an adapter's base model, with nothing of ours, gives the stored bits on this machine."""
    folder = name.split("/")[0]
    _, stored, facts = loaded(name)
    if version("torch") != read(folder, "versions.json")["torch"] or "base_logits" not in stored:
        return False
    with torch.no_grad():
        return torch.equal(load_base(folder, facts["base"])(**batch_of(stored)).logits, stored["base_logits"])


@cache
def exact(name: str) -> Any:
    """The PEFT model of an adapter, in float64 where this machine does not compute as that one did."""
    return loaded(name)[0] if computes_as_then(name) else load(name).double()


@pytest.mark.parametrize("name", ADAPTERS)
def test_full_depth(name: str) -> None:
    """Logits of all exits, and the loss."""
    model, (_, stored, facts) = exact(name), loaded(name)
    labels = {"labels": stored["labels"]} if "labels" in stored else {}
    labels = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in labels.items()}
    with torch.no_grad():
        output = model(**batch_of(stored), **labels)
    if computes_as_then(name):
        assert torch.equal(output.logits, stored["logits"])
        assert torch.equal(output.exit_logits, stored["exit_logits"])
    assert_close(output.logits, stored["logits"])
    assert_close(output.exit_logits, stored["exit_logits"])
    if labels:
        assert output.loss.item() == pytest.approx(facts["loss"], rel=CLOSE)


@pytest.mark.parametrize("name", ADAPTERS)
def test_early_exits(name: str) -> None:
    """Every policy: blocks exactly, logits to rounding."""
    model, stored, facts = loaded(name)
    assert any(len({*torch.tensor(call["exit_layer"]).flatten().tolist()}) > 1 for call in facts["calls"])
    for i, call in enumerate(facts["calls"]):
        for one in dict.fromkeys([model, exact(name)]):
            answer = one.early_exit_forward(**batch_of(stored), early_exit_config=call["rule"] or None)
            layers = answer.token_exit_layer if answer.token_exit_layer is not None else answer.exit_layer
            assert layers.tolist() == call["exit_layer"], call["rule"]
        logits = stored["early_logits"][i] if "early_logits" in stored else stored[f"early_logits.{i}"]
        assert_close(answer.logits, logits)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_saved_as_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensors bit for bit, and a config with every entry as it was."""
    folder, own = name.split("/")
    monkeypatch.chdir(HERE / folder)  # PEFT looks for the base model, whose name is a relative path
    load(name).save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    wanted = tensors(folder, "adapters", own, "adapter_model.safetensors")
    kept = wanted.keys() - {CONFIG_TENSOR}
    assert found.keys() == {*kept, CONFIG_TENSOR}  # which `data` does not have yet
    assert all(torch.equal(found[key], wanted[key]) for key in kept)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    made = ("badge_version", "peft_version", "base_model_name_or_path", "weights_hash", *REMOVED)
    expected = read(folder, "adapters", own, "adapter_config.json")
    expected = {key: value for key, value in expected.items() if key not in made}
    if expected["early_exit"] is not None:
        expected["early_exit"].pop("normalize", None)  # fields that came later are there, too
        config["early_exit"] = {key: config["early_exit"][key] for key in expected["early_exit"]}
    assert {key: config.get(key, "missing") for key in expected} == expected


def test_every_policy_was_stored() -> None:
    """Else a policy could change unseen."""
    names = {call["rule"].get("policy", "divergence") for name in ADAPTERS for call in loaded(name)[2]["calls"]}
    assert names == {
        "divergence", "patience", "entropy", "max_prob", "learned", "confident_patience", "agreement", "fixed_depth",
        "never", "top_k",
    }  # fmt: skip
    assert names <= set(POLICIES)


def test_one_call_for_rows_of_several_adapters() -> None:
    """With a policy of the call, and with the adapters' own."""
    facts, stored = read("data", "mixed.json"), tensors("data", "mixed.safetensors")
    model = load(*(f"data/{name}" for name in dict.fromkeys(facts["adapter_names"]) if name != "__base__"))
    call = {**batch_of(stored), "adapter_names": facts["adapter_names"]}
    for rule, prefix in ((facts["rule"], ""), (None, "own_")):
        for dtype in (torch.float32, torch.float64):
            answer = early_exit_forward(model.to(dtype), **call, early_exit_config=rule)
            assert answer.exit_layer.tolist() == facts[f"{prefix}exit_layer"]
        assert_close(answer.logits, stored[f"{prefix}logits"])


def test_tasks_in_one_pass_and_in_one_file() -> None:
    facts, stored = read("later", "answers", "tasks.json"), tensors("later", "answers", "tasks.safetensors")
    rules, batch = facts["rules"], batch_of(stored)
    model = load(*(f"later/{name}" for name in rules))
    for dtype in (torch.float32, torch.float64):
        answers = model.to(dtype).early_exit_forward(**batch, tasks=list(rules), early_exit_config=rules)
        for name, layers in facts["exit_layer"].items():
            assert answers[name].exit_layer.tolist() == layers
    for name in rules:
        assert_close(answers[name].logits, stored[f"{name}.logits"])
    pytest.importorskip("onnxruntime")
    from badge_peft.export import OnnxTasksModel

    found = OnnxTasksModel.from_pretrained(HERE / "later" / "tasks", threads=1)(*(x.numpy() for x in batch.values()))
    for name, layers in facts["exit_layer"].items():
        assert found[name].exit_layer.tolist() == layers
        assert_close(torch.from_numpy(found[name].logits), stored[f"{name}.logits"], 1e-4)


def test_load_pretrained_finds_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name in the adapter's config."""
    monkeypatch.chdir(DATA)
    model, stored = load_pretrained("adapters/bert_default"), tensors("data", "answers", "bert_default.safetensors")
    with torch.no_grad():
        assert_close(model.double()(**batch_of(stored)).exit_logits, stored["exit_logits"])


# ------------------------------------------------------------------------------------------------ stored exit logits


@pytest.mark.parametrize("name", EXITS)
def test_stored_exit_logits(name: str) -> None:
    """Replays of all policies; a sweep, with the same points in the same order; and the same configs where a bound is
    asked for. (Without one, settings are chosen otherwise since: docs/decisions/auto-policy.md.)"""
    wanted = read("data", "exits", f"{name}.json")
    stored, metric = ExitLogits.load(DATA / "exits" / f"{name}.safetensors"), wanted["metric"]
    for entry in wanted["replay"]:
        assert build_policy(entry["rule"]).replay(stored).tolist() == entry["exit_layer"], entry["rule"]
    policies = list(dict.fromkeys(p["policy"] for p in wanted["sweep"] if p["policy"] != "fixed_depth"))
    found = sweep(stored, policies=policies, points=6, metric=metric).to_dicts()
    for point, other in zip(found, wanted["sweep"], strict=True):
        assert_same_setting(point, other)
    calls = [entry for entry in wanted["calibrate"] if "confidence" in entry["call"]]
    assert calls or name != "single_label"
    for entry in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a fixed depth is better
            config = calibrate(stored, metric=metric, **entry["call"])
        then = EarlyExitConfig.of(entry["config"])
        assert torch.equal(build_policy(config).replay(stored), build_policy(then).replay(stored))
        assert_same_setting(config.to_dict(), entry["config"])


def assert_same_setting(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Equal, what `agreement` has fitted apart: `tests/early_exit/test_agreement_fit.py` has its coefficients."""
    if wanted["policy"] == "agreement":
        assert found.pop("threshold") == pytest.approx(wanted.pop("threshold"), abs=FITTED)
        for name in ("coefficients", "intercepts"):
            wanted.get("parameters", {}).pop(name, None)
    assert_same(found, wanted)


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Equal, numbers to rounding."""
    if isinstance(wanted, dict):
        assert set(wanted) <= set(found), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=CLOSE, abs=CLOSE), where
    else:
        assert found == wanted, where


# -------------------------------------------------------------------------------------------------------------- ONNX


def exact_int8(folder: Path, place: Path) -> Path:
    """A copy with its int8 weights as uint8, which are the same numbers: kernels of x86 without VNNI add products of
    uint8 and int8 in 16 bits, and these overflow."""
    ir = pytest.importorskip("onnx_ir")
    model = ir.load(folder / "model.onnx")
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.dtype == ir.DataType.INT8:
                shifted = (value.const_value.numpy().astype(np.int16) + 128).astype(np.uint8)
                value.const_value = ir.tensor(shifted, name=value.name)
                value.dtype = ir.DataType.UINT8
    shutil.copytree(folder, place, dirs_exist_ok=True)
    ir.save(model, place / "model.onnx")
    return place


@pytest.mark.parametrize("name", ["data/onnx/fp32", "data/onnx/int8", "later/ranking"])
def test_an_exported_model(name: str, tmp_path: Path) -> None:
    """A file of then runs as then: of a classifier all rows at once, and each alone; of a ranking model one query."""
    pytest.importorskip("onnxruntime")
    from badge_peft.export import OnnxEarlyExitModel

    stored = tensors(name, "answers.safetensors")
    session = OnnxEarlyExitModel.from_pretrained(exact_int8(HERE / name, tmp_path), threads=1)
    rows = len(stored["input_ids"])
    prefixes = [prefix for prefix in ("", "alone_") if f"{prefix}logits" in stored]
    for prefix in prefixes:
        size = 1 if prefix else rows
        parts = [slice(i, i + size) for i in range(0, rows, size)]
        answers = [session(stored["input_ids"][part], stored["attention_mask"][part]) for part in parts]
        exit_layer = torch.cat([torch.from_numpy(answer.exit_layer) for answer in answers])
        assert torch.equal(exit_layer, stored[f"{prefix}exit_layer"]) and len(exit_layer.unique()) > 1
        logits = torch.cat([torch.from_numpy(answer.logits) for answer in answers])
        assert_close(logits, stored[f"{prefix}logits"], 1e-5 if "ranking" in name else None)
