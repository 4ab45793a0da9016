"""Files and answers of commit b7d5fc6 against the code as it is now: see `make.py`, which wrote `data`.

Where this machine computes the *base model* as the machine did that made the data (same torch, and base logits equal
bit for bit), full depth is compared bit for bit, and all that passes through compacted batches to 1e-6 of the largest
logit. Elsewhere float32 rounds in other places, so logits are computed in float64, which differs from the stored ones
by what those had rounded: the same on every machine, at most 3e-6 of the largest. Exits are compared exactly
everywhere, in float32: no row's decision hangs on less than 1e-4.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from badge_peft import EarlyExitConfig, ExitLogits, calibrate, early_exit_forward, load_pretrained, sweep
from badge_peft.early_exit.policies import POLICIES, build_policy
from badge_peft.tuner.adapter_file import CONFIG_TENSOR
from badge_peft.tuner.config_rules import REMOVED

DATA = Path(__file__).parent / "data"
ADAPTERS = sorted(path.stem for path in (DATA / "answers").glob("*.json"))
EXITS = sorted(path.stem for path in (DATA / "exits").glob("*.json"))
CLOSE = 1e-6
ROUNDED = 5e-6  # what float32 has lost in the stored logits
FITTED = 1e-3  # thresholds of `agreement`: its stored coefficients are where an optimizer had stopped


def read(*parts: str) -> Any:
    """A JSON file of `data`."""
    return json.loads(DATA.joinpath(*parts).read_text(encoding="utf-8"))


def tensors(*parts: str) -> dict[str, Tensor]:
    """A safetensors file of `data`."""
    return load_file(DATA.joinpath(*parts))


def load_base(name: str) -> Any:
    """A base model, in eval mode."""
    return AutoModelForSequenceClassification.from_pretrained(DATA / "bases" / name).eval()


def load(name: str) -> Any:
    """The PEFT model of an adapter, in eval mode."""
    base = load_base(read("answers", f"{name}.json")["base"])
    return PeftModel.from_pretrained(base, str(DATA / "adapters" / name)).eval()


@cache
def loaded(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """(the PEFT model, its stored tensors, its stored facts)."""
    return load(name), tensors("answers", f"{name}.safetensors"), read("answers", f"{name}.json")


def batch_of(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a call."""
    return {name: stored[name] for name in ("input_ids", "attention_mask")}


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal to the rounding of float32, or, for answers in float64, of what is stored."""
    close = ROUNDED if found.dtype == torch.float64 else CLOSE
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=close * max(1.0, wanted.abs().max().item()))


@cache
def computes_as_then(name: str) -> bool:
    """Whether an adapter's base model, with nothing of ours, gives the stored bits on this machine."""
    if version("torch") != read("versions.json")["torch"]:
        return False
    _, stored, facts = loaded(name)
    with torch.no_grad():
        return torch.equal(load_base(facts["base"])(**batch_of(stored)).logits, stored["base_logits"])


@cache
def exact(name: str) -> Any:
    """The PEFT model of an adapter, in float64 where this machine does not compute as that one did."""
    return loaded(name)[0] if computes_as_then(name) else load(name).double()


@pytest.mark.parametrize("name", ADAPTERS)
def test_full_depth(name: str) -> None:
    """Logits of all exits, and the loss."""
    model, (_, stored, facts) = exact(name), loaded(name)
    labels = stored["labels"]
    with torch.no_grad():
        output = model(**batch_of(stored), labels=labels.to(model.dtype) if labels.is_floating_point() else labels)
    if computes_as_then(name):
        assert torch.equal(output.logits, stored["logits"])
        assert torch.equal(output.exit_logits, stored["exit_logits"])
    assert_close(output.logits, stored["logits"])
    assert_close(output.exit_logits, stored["exit_logits"])
    assert output.loss.item() == pytest.approx(facts["loss"], rel=CLOSE)


@pytest.mark.parametrize("name", ADAPTERS)
def test_early_exits(name: str) -> None:
    """Every policy: blocks exactly, logits to rounding."""
    model, stored, facts = loaded(name)
    batch = batch_of(stored)
    wrong = []
    for call, logits in zip(facts["calls"], stored["early_logits"], strict=True):
        answer = model.early_exit_forward(**batch, early_exit_config=call["rule"] or None)
        if answer.exit_layer.tolist() != call["exit_layer"]:
            wrong.append((call["rule"], answer.exit_layer.tolist(), call["exit_layer"]))
        elif computes_as_then(name):
            assert_close(answer.logits, logits)
        else:
            again = exact(name).early_exit_forward(**batch, early_exit_config=call["rule"] or None)
            assert again.exit_layer.tolist() == call["exit_layer"]
            assert_close(again.logits, logits)
    assert not wrong


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_saved_as_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensors bit for bit, and a config with every entry as it was."""
    monkeypatch.chdir(DATA)  # PEFT looks for the base model, whose name is a relative path
    load(name).save_pretrained(tmp_path)
    found, wanted = (
        load_file(tmp_path / "adapter_model.safetensors"),
        tensors("adapters", name, "adapter_model.safetensors"),
    )
    assert found.keys() == {*wanted, CONFIG_TENSOR}  # which it holds since
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    expected = read("adapters", name, "adapter_config.json")
    expected = {key: value for key, value in expected.items() if key not in REMOVED}
    versions = {key: config[key] for key in ("badge_version", "peft_version", "base_model_name_or_path")}
    if expected["early_exit"] is not None:
        del expected["early_exit"]["normalize"]  # fields that came later are there, too
        config["early_exit"] = {key: config["early_exit"][key] for key in expected["early_exit"]}
    assert {key: config.get(key, "missing") for key in expected} == {**expected, **versions}


def test_every_policy_was_stored() -> None:
    """Else a policy could change unseen."""
    names = {call["rule"].get("policy", "divergence") for name in ADAPTERS for call in loaded(name)[2]["calls"]}
    assert names == {
        "divergence", "patience", "entropy", "max_prob", "learned", "confident_patience", "agreement", "fixed_depth",
        "never",
    }  # fmt: skip
    assert names <= set(POLICIES)


def test_one_call_for_rows_of_several_adapters() -> None:
    """With a policy of the call, and with the adapters' own."""
    facts, stored = read("mixed.json"), tensors("mixed.safetensors")
    names = [name for name in dict.fromkeys(facts["adapter_names"]) if name != "__base__"]
    model = PeftModel.from_pretrained(load_base("bert"), str(DATA / "adapters" / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(DATA / "adapters" / name), adapter_name=name)
    call = {**batch_of(stored), "adapter_names": facts["adapter_names"]}
    for rule, prefix in ((facts["rule"], ""), (None, "own_")):
        for dtype in (torch.float32, torch.float64):
            answer = early_exit_forward(model.eval().to(dtype), **call, early_exit_config=rule)
            assert answer.exit_layer.tolist() == facts[f"{prefix}exit_layer"]
        assert_close(answer.logits, stored[f"{prefix}logits"])


def test_load_pretrained_finds_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name in the adapter's config."""
    monkeypatch.chdir(DATA)
    model, stored = load_pretrained("adapters/bert_default"), tensors("answers", "bert_default.safetensors")
    with torch.no_grad():
        assert_close(model.double()(**batch_of(stored)).exit_logits, stored["exit_logits"])


# ------------------------------------------------------------------------------------------------ stored exit logits


@pytest.mark.parametrize("name", EXITS)
def test_sweep(name: str) -> None:
    """The same points in the same order."""
    wanted = read("exits", f"{name}.json")
    stored = ExitLogits.load(DATA / "exits" / f"{name}.safetensors")
    policies = list(dict.fromkeys(p["policy"] for p in wanted["sweep"] if p["policy"] != "fixed_depth"))
    found = sweep(stored, policies=policies, points=6, metric=wanted["metric"]).to_dicts()
    assert len(found) == len(wanted["sweep"])
    for point, other in zip(found, wanted["sweep"], strict=True):
        assert_same_setting(point, other)


@pytest.mark.parametrize("name", EXITS)
def test_calibrate(name: str) -> None:
    """The same configs where a bound is asked for. (Without one, settings are chosen otherwise since:
    docs/decisions/auto-policy.md.)"""
    wanted = read("exits", f"{name}.json")
    stored = ExitLogits.load(DATA / "exits" / f"{name}.safetensors")
    calls = [entry for entry in wanted["calibrate"] if "confidence" in entry["call"]]
    assert calls or name != "single_label"
    for entry in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a fixed depth is better
            config = calibrate(stored, metric=wanted["metric"], **entry["call"])
        found, then = config.to_dict(), EarlyExitConfig.of(entry["config"])
        assert torch.equal(build_policy(config).replay(stored), build_policy(then).replay(stored))
        assert_same_setting(found, entry["config"])


@pytest.mark.parametrize("name", EXITS)
def test_replay(name: str) -> None:
    """Policies with thresholds between two signals, and with their defaults."""
    stored = ExitLogits.load(DATA / "exits" / f"{name}.safetensors")
    for entry in read("exits", f"{name}.json")["replay"]:
        assert build_policy(entry["rule"]).replay(stored).tolist() == entry["exit_layer"], entry["rule"]


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


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_an_exported_model(name: str) -> None:
    """A file of then runs as then."""
    pytest.importorskip("onnxruntime")
    from badge_peft.export import OnnxEarlyExitModel

    stored = tensors("onnx", name, "answers.safetensors")
    session = OnnxEarlyExitModel.from_pretrained(DATA / "onnx" / name, threads=1)
    rows = len(stored["input_ids"])
    for prefix, parts in (("", [slice(0, rows)]), ("alone_", [slice(i, i + 1) for i in range(rows)])):
        answers = [session(stored["input_ids"][part], stored["attention_mask"][part]) for part in parts]
        exit_layer = torch.cat([torch.from_numpy(answer.exit_layer) for answer in answers])
        assert torch.equal(exit_layer, stored[f"{prefix}exit_layer"])
        assert_close(torch.cat([torch.from_numpy(answer.logits) for answer in answers]), stored[f"{prefix}logits"])
