"""Adapters and base models in other precisions (a base in half precision: tests.tuner.test_checkpoint.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, cast_mixed_precision_params, get_peft_model, prepare_model_for_kbit_training

from badge_peft import BadgeConfig
from tests.models import exits_of, make_badge, make_batch, make_labels, make_model, trained
from tests.peft_verbs.table import ARCHITECTURES, CONFIGS

HALF = [torch.bfloat16, torch.float16]
# Small weights, so that rounding stays small.
SMALL = {"initializer_range": 0.1}
BATCH = make_batch()


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the largest difference is small beside the spread of the logits."""
    return bool((found.float() - expected).abs().max() < 0.15 * expected.std())


def without_gradient(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_an_adapter_in_the_precision_of_its_base(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """`autocast_adapter_dtype=False` leaves no float32 anywhere, and the file keeps what it was."""

    def load(name: str) -> Any:
        base = make_model(case, **SMALL).to(dtype)
        return PeftModel.from_pretrained(base, tmp_path / name, autocast_adapter_dtype=False)

    model = trained(case, base=make_model(case, **SMALL))
    expected = exits_of(model, BATCH)
    model.save_pretrained(tmp_path / "float32")
    half = load("float32")
    assert {p.dtype for p in half.parameters()} == {dtype}
    found = exits_of(half, BATCH)
    assert found.dtype == dtype
    assert near(found, expected)
    half.save_pretrained(tmp_path / "half")
    assert torch.equal(exits_of(load("half"), BATCH), found)
    new = get_peft_model(make_model(case).to(dtype), BadgeConfig(), autocast_adapter_dtype=False)
    loss = new(**BATCH, labels=make_labels()).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_is_cast_as_a_whole(name: str, dtype: torch.dtype) -> None:
    model = trained(base=make_model(**SMALL), **CONFIGS[name])
    expected = exits_of(model, BATCH)
    found = exits_of(model.to(dtype), BATCH)
    assert found.dtype == dtype
    assert near(found, expected)
    answer = model.early_exit_forward(**BATCH, policy="never")
    torch.testing.assert_close(answer.logits, found[:, -1])


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("full")])
def test_cast_for_mixed_precision(name: str) -> None:
    """What PEFT casts for training under autocast: the frozen base in bfloat16, what is trained in float32."""
    model = trained(base=make_model(**SMALL), **CONFIGS[name])
    expected = exits_of(model, BATCH)
    labels = make_labels(num_labels=expected.shape[-1])
    model.train()(**BATCH, labels=labels).loss.backward()
    unused = without_gradient(model)
    model.eval().zero_grad()
    cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        found = exits_of(model, BATCH)
    with torch.autocast("cpu", torch.bfloat16):  # anew: torch 2.4 keeps casts that were made without gradients
        loss = model.train()(**BATCH, labels=labels).loss
    loss.backward()
    assert without_gradient(model) == unused and near(found, expected)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_prepared_for_training_on_few_bits(case: str) -> None:
    """`prepare_model_for_kbit_training` freezes the base and casts it to float32; the exits are the same."""
    expected = exits_of(make_badge(case), BATCH)
    model = make_badge(case, base=prepare_model_for_kbit_training(make_model(case)))
    assert torch.equal(exits_of(model, BATCH), expected)
    model.train()(**BATCH, labels=make_labels()).loss.backward()
    assert not without_gradient(model)
