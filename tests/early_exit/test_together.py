"""Tasks of like shape: stacked weights read what each exit reads, and one history decides what each policy decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from badge_peft import BadgeConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policy_reader import PolicyReader
from badge_peft.early_exit.together import JointDecision, Readings, TaskReaders
from badge_peft.tuner import stacked
from badge_peft.tuner.exits import AdapterExits
from tests.models import blocks_of, make_badge, make_batch, shake

from .reference import MULTI, REGRESSION, SINGLE
from .rules import NO_REGRESSION, ON_LOGITS, fields_of, with_threshold

LENGTH = 10
LABELS = {"two": 2, "seven": 7, "three": 3, "five": 5}


def make(case: str = "bert", **fields: Any) -> Any:
    """Four adapters of like shape, with labels and thresholds of their own."""
    model = None
    for seed, (name, labels) in enumerate(LABELS.items()):
        own = {"r": 4, "final_exit": "exit", "num_labels": labels, **fields}
        if model is None:
            model = make_badge(case, adapter_name=name, **own)
        else:
            model.add_adapter(name, BadgeConfig(**own))
            shake(model, seed=seed, only=f".{name}.")
    assert model is not None
    model.eval()
    for share, name in enumerate(LABELS, start=1):
        model.set_adapter(name)
        with torch.no_grad():
            logits = model(**make_batch(9, LENGTH)).exit_logits
        rule = with_threshold({"policy": "entropy"}, logits, model.exit_layers(), share / 5)
        model.set_early_exit_config(rule)
    return model


def check(model: Any, batch: dict[str, torch.Tensor], **rule: Any) -> None:
    out = model.early_exit_forward(**batch, tasks=list(LABELS), **rule)
    for name in LABELS:
        model.set_adapter(name)
        want = model.early_exit_forward(**batch, **rule)
        assert out[name].exit_layer.tolist() == want.exit_layer.tolist()
        torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks each product was for."""
    seen: list[int] = []
    real = stacked.StackedExits.logits

    def counted(self: Any, frame: Any, pooling: Any, which: Any) -> Any:
        seen.append(len(which))
        return real(self, frame, pooling, which)

    monkeypatch.setattr(stacked.StackedExits, "logits", counted)
    return seen


@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-mean"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("placement", ["block", "ffn"])
def test_stacked_exits_are_those_of_each_task(case: str, pooling: str, placement: str, products: list[int]) -> None:
    norm = "own" if case == "bert" else "shared"
    model = make(case, exit_pooling=pooling, placement=placement, norm=norm, bias=pooling == "last")
    for batch in (make_batch(9, LENGTH), make_batch(1, LENGTH), make_batch(3, LENGTH, side="left")):
        check(model, batch)
    assert 4 in products


@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-mean"])
def test_exits_that_carry_logits(case: str, products: list[int]) -> None:
    """All of them, or two beside two that stand alone; the first exits of some come later."""
    batches = (make_batch(9, LENGTH), make_batch(1, LENGTH))
    model = make(case, carry="logits")
    for batch in batches:
        check(model, batch)
    assert 4 in products
    for name, fields in {"seven": {"carry": None}, "three": {"exit_layers": [2, 3]}}.items():
        model.delete_adapter(name)
        own: dict[str, Any] = {"r": 4, "final_exit": "exit", "num_labels": LABELS[name], "carry": "logits", **fields}
        model.add_adapter(name, BadgeConfig(**own))
        shake(model, seed=5, only=f".{name}.")
        model.set_adapter(name)
        model.set_early_exit_config({"policy": "entropy", "threshold": 0.8, "normalize": True})
    products.clear()
    for batch in batches:
        check(model.eval(), batch)
    assert 4 in products and 3 in products


def test_an_exit_that_is_read_for_the_next_one_alone(products: list[int]) -> None:
    """No rule asks it; and where it says NaN, nobody doubts."""
    model, batch = make(carry="logits"), make_batch(5, LENGTH)
    with torch.no_grad():
        blocks_of(model)[0].badge_exit["three"]["1"].linear.bias.fill_(torch.nan)
    rules = {name: {"policy": "entropy", "threshold": 0.3, "min_exit": 2} for name in LABELS}
    out = model.early_exit_forward(**batch, tasks=list(LABELS), early_exit_config=rules)
    assert products[:2] == [4, 4]
    for name in LABELS:
        model.set_adapter(name)
        want = model.early_exit_forward(**batch, early_exit_config=rules[name])
        assert out[name].exit_layer.tolist() == want.exit_layer.tolist()
        assert not out[name].non_finite.any() and not want.non_finite.any()
        torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)


def test_only_tasks_that_still_ask_are_in_a_product(products: list[int]) -> None:
    model, batch = make(), make_batch(1, LENGTH)
    depths = {"two": 3, "seven": 1, "three": 2, "five": 3}
    rules = {name: {"policy": "patience", "patience": 9, "max_exit": depth} for name, depth in depths.items()}
    out = model.early_exit_forward(**batch, tasks=list(LABELS), early_exit_config=rules)
    assert products == [4, 3, 2]
    for name in LABELS:
        model.set_adapter(name)
        want = model.early_exit_forward(**batch, early_exit_config=rules[name])
        assert out[name].exit_layer.tolist() == want.exit_layer.tolist() == [depths[name]]
        torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{"placement": "none"}, {"exit_type": "pooled"}, {"placement": "mhsa"}], ids=str)
def test_other_exits_are_read_one_by_one(fields: dict[str, Any], products: list[int]) -> None:
    check(make(**fields), make_batch(9, LENGTH))
    assert products == []


def test_many_rows_are_read_one_by_one(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(stacked, "LARGEST", 32 - 1)  # below one row
    check(model, make_batch(4, LENGTH))
    assert products == []
    monkeypatch.setattr(stacked, "LARGEST", 4 * 32)
    check(model, make_batch(4, LENGTH))
    assert products


def test_under_autocast(products: list[int]) -> None:
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.early_exit_forward(**make_batch(2, LENGTH), tasks=list(LABELS), policy="never")
        for name in LABELS:
            model.set_adapter(name)
            want = model.early_exit_forward(**make_batch(2, LENGTH), policy="never")
            assert torch.equal(out[name].logits, want.logits)
    assert products == []


def test_a_hook_on_an_exit_is_called(products: list[int]) -> None:
    model = make()
    called: list[int] = []
    exit_ = blocks_of(model)[0].badge_exit["three"]["1"]
    hook = exit_.register_forward_hook(lambda *_: called.append(1))
    check(model, make_batch(2, LENGTH))
    hook.remove()
    assert called and 3 in products  # the other three are read together


def test_a_hook_on_what_is_carried_is_called(products: list[int]) -> None:
    model, batch = make(carry="logits"), make_batch(2, LENGTH)
    check(model, batch)  # stacks are kept from here on
    called: list[int] = []
    carry = blocks_of(model)[1].badge_exit["three"]["2"].carry
    hook = carry.register_forward_hook(lambda *_: called.append(1))
    products.clear()
    check(model, batch)
    hook.remove()
    assert called == [1, 1]  # together with others, and alone


def test_weights_that_have_changed_are_seen() -> None:
    model, batch = make(), make_batch(2, LENGTH)
    first = {"policy": "fixed_depth", "depth": 1}  # the exit whose weights change answers
    check(model, batch, **first)
    part = blocks_of(model)[0].badge_bypass["two"]["1"]
    with torch.no_grad():
        part.up.weight.mul_(-1.0)
    check(model, batch, **first)
    part.down.weight = nn.Parameter(-part.down.weight.detach())
    check(model, batch, **first)
    part.down.weight.data = -part.down.weight.detach()  # as `model.to(...)` does it
    check(model, batch, **first)
    model.delete_adapter("seven")
    model.add_adapter("seven", BadgeConfig(r=4, final_exit="exit", num_labels=7))
    shake(model, seed=7, only=".seven.")
    check(model.eval(), batch, **first)


def test_a_pooling_is_worked_out_once_for_all_tasks() -> None:
    exits = [AdapterExits(name, [1, 2], "mean", 3, SINGLE, True) for name in "ab"]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    group = TaskReaders([PolicyReader(own, 2, mask, 0, build_policy(policy="entropy")) for own in exits])
    first, second = group.readers
    assert first.pooling is second.pooling
    group.keep_rows(np.array([1]), torch.tensor([1]), None)
    assert first.pooling is second.pooling and first.pooling.mask is not None
    assert first.pooling.mask.tolist() == [[1, 1, 1]]


# --------------------------------------------------------------------------------------------------------- decisions


def readers_of(
    policies: list[Any], exits: list[int], labels: list[int], problem: str, rows: int
) -> list[PolicyReader]:
    found = []
    for i, (policy, count) in enumerate(zip(policies, labels, strict=True)):
        found.append(PolicyReader(AdapterExits(str(i), exits, "cls", count, problem, True), rows, None, 0, policy))
    return found


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_deciding_together_is_deciding_alone(data: Any) -> None:
    """For each task, its policy's replay of its logits."""
    problem = data.draw(st.sampled_from([SINGLE, MULTI, REGRESSION]))
    names = [name for name in ON_LOGITS if problem != REGRESSION or name not in NO_REGRESSION]
    exits = data.draw(st.sampled_from([[1, 2, 3, 4, 5], [0, 2, 3, 6], [0, 3]]))
    labels = [1] * 3 if problem == REGRESSION else data.draw(st.lists(st.integers(2, 6), min_size=2, max_size=4))
    name = data.draw(st.sampled_from(names))
    shared = {
        "divergence": data.draw(st.sampled_from(["ce", "kl", "js", "label"])),
        "window": data.draw(st.sampled_from(["all", "consecutive"])),
        "patience": data.draw(st.none() | st.integers(1, 3)),
    }
    policies = []
    for count in labels:
        own = {
            "threshold": data.draw(st.none() | st.floats(0.05, 1.5).map(lambda x: x + 1e-4 / 3)),
            "decide_every": data.draw(st.sampled_from([1, 1, 2, 3])),
            "min_exit": data.draw(st.sampled_from([None, 2, 3])),
            "max_exit": data.draw(st.sampled_from([None, None, 3])),
            "normalize": data.draw(st.booleans()),
        }
        policies.append(build_policy({**fields_of(name, exits, count, problem), **shared, **own}))
    rows, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, len(exits), count, generator=generator) for count in labels]
    if data.draw(st.booleans()):
        logits[0][0, 0, 0] = torch.nan
    readers = readers_of(policies, exits, labels, problem, rows)
    keys = {policy.company(count) for policy, count in zip(policies, labels, strict=True)}
    if len(keys) > 1 or None in keys:
        return  # these decide by themselves
    decision = JointDecision(readers)
    linear = SimpleNamespace(feeds_later_exits=False, linear=nn.Linear(1, 1))
    block: Any = SimpleNamespace(has_exit=lambda *_: True, own_exit=lambda *_: linear)
    for j, number in enumerate(exits):
        asking = [i for i, reader in enumerate(readers) if reader.num_active and reader.asks(block, number)]
        found = Readings()
        for i in asking:
            found.put(readers[i], logits[i][:, j], None)
        decision.take(number, found)
    for reader, policy, own in zip(readers, policies, logits, strict=True):
        want = policy.replay(own, exits, problem)
        assert reader.exit_layer.tolist() == want.tolist()
        picked = own[torch.arange(rows), [exits.index(m) for m in want.tolist()]]
        assert reader.answer is not None and torch.equal(reader.answer.nan_to_num(9), picked.nan_to_num(9))


def test_one_task_ends_in_the_models_head_and_one_in_an_exit() -> None:
    model = make_badge(adapter_name="head")
    model.add_adapter("exit", BadgeConfig(r=4, final_exit="exit"))
    shake(model.eval(), seed=3, only=".exit.")
    for threshold in (0.0, 0.5, 9.0):
        rule = {"policy": "entropy", "threshold": threshold}
        out = model.early_exit_forward(**make_batch(5, LENGTH), tasks=["head", "exit"], **rule)
        for name in ("head", "exit"):
            model.set_adapter(name)
            want = model.early_exit_forward(**make_batch(5, LENGTH), **rule)
            assert out[name].exit_layer.tolist() == want.exit_layer.tolist()
            torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)


def test_a_product_of_more_tasks_than_decide_together(products: list[int]) -> None:
    """One that never decides is read beside the others; it has more labels than they, or is in between."""
    model, batch = make(), make_batch(3, LENGTH)
    for lonely in ("seven", "three"):
        rules: dict[str, Any] = {name: model.get_early_exit_config(name) for name in LABELS}
        rules[lonely] = {"policy": "divergence", "patience": 9}
        out = model.early_exit_forward(**batch, tasks=list(LABELS), early_exit_config=rules)
        assert products[0] == 4
        for name in LABELS:
            model.set_adapter(name)
            want = model.early_exit_forward(**batch, early_exit_config=rules[name])
            assert out[name].exit_layer.tolist() == want.exit_layer.tolist()
            torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)


def test_which_policies_decide_together() -> None:
    alike = [{"policy": "entropy", "threshold": tau, "normalize": tau > 0.3} for tau in (0.2, 0.4)]
    first, second = (build_policy(rule).company(3) for rule in alike)
    assert first == second == build_policy(alike[0]).company(9) is not None
    assert build_policy(policy="entropy", min_exit=2, max_exit=5, decide_every=2).company(3) == first
    assert build_policy(policy="divergence", patience=2).company(3) != build_policy(policy="divergence").company(3)
    assert build_policy(policy="max_prob").company(3) != first
    sure = build_policy(policy="confident_patience")  # whose score is a share of ln K
    assert sure.company(3) != sure.company(4)
    for rule in ({"policy": "never"}, {"policy": "learned"}, {"policy": "fixed_depth", "depth": 1}):
        assert build_policy(rule).company(3) is None
