"""`explain`: the exit and the logits are the live path's, and the reason given is the formula's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.app.explain import Explanation, explain, read_exits
from badge_peft.early_exit.config import DIVERGENCES, WINDOWS
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits
from tests.early_exit.reference import MULTI, REGRESSION, SINGLE, dge, divergences, entropy, pabee, softmax
from tests.early_exit.rules import NO_REGRESSION, ON_LOGITS, fields_of
from tests.early_exit.table_model import as_inputs, table_model
from tests.models import make_badge, make_batch

EXITS = (0, 1, 2, 4, 5)
KINDS = ((SINGLE, 2), (SINGLE, 5), (MULTI, 3), (REGRESSION, 1))


def same_as_live(model: Any, inputs: dict[str, torch.Tensor], rule: dict[str, Any]) -> Explanation:
    """The explanation of one row, compared with the live path to the last bit."""
    live = model.early_exit_forward(**inputs, early_exit_config=rule)
    found = explain(read_exits(model, inputs), rule)
    assert found.exit_layer == live.exit_layer.item()
    assert torch.equal(torch.from_numpy(found.answer.logits), live.logits[0].float())
    check_shape(found)
    return found


def check_shape(found: Explanation) -> None:
    """One step answers, the first that stops; what is said to stop or go on is what the numbers say."""
    blocks = [step.block for step in found.steps]
    assert blocks == sorted(set(blocks))
    first = next(j for j, step in enumerate(found.steps) if step.stops)
    assert [step.answers for step in found.steps] == [j == first for j in range(len(blocks))]
    assert [step.reached for step in found.steps] == [j <= first for j in range(len(blocks))]
    assert found.steps[-1].stops and found.blocks_saved == found.num_blocks - blocks[first]
    policy = build_policy(found.rule)
    for j, step in enumerate(found.steps):
        if policy.is_final(blocks, j):
            assert step.stops
        elif not policy.can_exit(blocks, j):
            assert not step.stops
        elif step.evidence is not None:
            seen = step.evidence
            if seen.count is None:
                assert step.stops == seen.measured[0].passes
            else:
                assert seen.patience is not None and step.stops == (seen.count >= seen.patience)
            if seen.threshold is not None:
                for m in seen.measured:
                    above = m.value >= np.float32(seen.threshold)
                    assert m.passes == (above if seen.above else m.value < np.float32(seen.threshold))


# ---------------------------------------------------------------------------------------------- as the live path does


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, int, np.ndarray, dict[str, Any]]:
    kind, labels = draw(st.sampled_from(KINDS))
    names = [n for n in ON_LOGITS if kind != REGRESSION or n not in NO_REGRESSION]
    rule = fields_of(draw(st.sampled_from(names)), EXITS, labels, kind)
    rule["divergence"] = draw(st.sampled_from(DIVERGENCES))
    rule["window"] = draw(st.sampled_from(WINDOWS))
    rule["threshold"] = draw(st.none() | st.floats(0, 3) | st.floats(0.3, 0.99))
    rule["patience"] = draw(st.none() | st.integers(1, 4))
    rule["decide_every"] = draw(st.sampled_from((1, 1, 2, 3)))
    low, high = sorted((draw(st.sampled_from(EXITS)), draw(st.sampled_from(EXITS))))
    rule["min_exit"], rule["max_exit"] = draw(st.sampled_from(((None, None), (low, None), (None, high), (low, high))))
    if rule["policy"] == "max_prob" and draw(st.booleans()):
        rule["temperature"] = [0.5 + j for j in range(len(EXITS))]
    spread = draw(st.sampled_from((0.3, 2.0, 30.0)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    drift = draw(st.sampled_from((0.2, 1.0)))  # how much an exit differs from the one before
    steps = np.concatenate([rng.normal(size=(1, labels)), drift * rng.normal(size=(EXITS[-1], labels))])
    return kind, labels, (spread * steps.cumsum(axis=0)).astype(np.float32), rule


@settings(max_examples=400, deadline=None)
@given(cases())
def test_any_rule_on_any_logits(case: tuple[str, int, np.ndarray, dict[str, Any]]) -> None:
    kind, labels, table, rule = case
    model = table_model(labels, kind, EXITS, EXITS[-1])
    found = same_as_live(model, as_inputs(torch.from_numpy(table)[None]), rule)
    assert [step.block for step in found.steps] == list(EXITS)
    for step in found.steps:
        np.testing.assert_array_equal(step.logits, table[step.block])


# ------------------------------------------------------------------------------------------------ the numbers, again


def reading(
    logits: list[list[float]], problem_type: str = SINGLE, uncertainty: list[float] | None = None
) -> ExitLogits:
    signals = None if uncertainty is None else torch.tensor([uncertainty])
    return ExitLogits(torch.tensor([logits]), problem_type=problem_type, uncertainty=signals)


ROW = [[0.0, 0.4, 0.1], [0.2, 1.0, -0.5], [0.1, 1.2, -0.4], [-1.0, 0.5, 2.0], [-1.5, 0.2, 3.0], [-1.4, 0.1, 3.2]]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("t", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ce", "kl", "js"])
def test_the_counter_of_eq_3(kind: str, t: int, window: str) -> None:
    s = divergences(kind, ROW, SINGLE)
    for tau in (0.02, 0.3, 0.9):
        found = explain(reading(ROW), threshold=tau, patience=t, divergence=kind, window=window)
        assert found.exit_layer == dge(s, window, tau, t)
        for m, step in enumerate(found.steps):
            assert step.evidence is not None
            everyone = window == "all"
            earlier = range(m) if everyone else range(max(0, m - 1), m)
            assert [x.block for x in step.evidence.measured] == [i + 1 for i in earlier]
            assert [x.value for x in step.evidence.measured] == pytest.approx([s[m][i] for i in earlier], abs=1e-5)
            run = 0
            while m - run > 0 and s[m - run][m - run - 1] < tau:
                run += 1
            assert step.evidence.count == (sum(s[m][i] < tau for i in range(m)) if everyone else run)
            assert (step.evidence.patience, step.evidence.threshold) == (t, pytest.approx(tau))
            assert step.evidence.in_a_row is not everyone


def test_the_patience_counter() -> None:
    found = explain(reading(ROW), policy="patience", patience=2)
    assert [step.evidence.count for step in found.steps if step.evidence] == [0, 1, 2, 0, 1, 2]
    assert found.exit_layer == pabee(ROW, SINGLE, 2, 0.5) == 3
    values = [[1.0], [1.3], [1.35], [1.32], [0.0]]
    found = explain(reading(values, REGRESSION), policy="patience", patience=2, threshold=0.1)
    assert [step.evidence.count for step in found.steps if step.evidence] == [0, 0, 1, 2, 0]
    assert found.exit_layer == pabee(values, REGRESSION, 2, 0.1) == 4
    assert found.steps[0].probabilities is None
    assert found.steps[1].evidence is not None
    assert found.steps[1].evidence.measured[0].value == pytest.approx(0.3)


def test_the_other_rules_say_their_own_number() -> None:
    def first(**rule: Any) -> Any:
        found = explain(reading(ROW, uncertainty=[0.5, 0.4, 0.3, 0.2, 0.1, 0.0]), **rule)
        return found.steps[0].evidence, found.exit_layer

    p = softmax(ROW[0])
    seen, _ = first(policy="entropy", threshold=0.5)
    assert (seen.quantity, seen.above, seen.count) == ("entropy", False, None)
    assert seen.measured[0].value == pytest.approx(entropy(p), abs=1e-6)
    seen, _ = first(policy="max_prob", threshold=0.8)
    assert (seen.quantity, seen.above) == ("largest probability", True)
    assert seen.measured[0].value == pytest.approx(max(p), abs=1e-6)
    seen, stopped = first(policy="learned", threshold=0.35)
    assert (seen.quantity, seen.measured[0].value, stopped) == ("predicted uncertainty", pytest.approx(0.5), 3)
    seen, _ = first(policy="confident_patience", threshold=0.99, patience=2)
    assert seen.measured[0].value == pytest.approx(entropy(p) / math.log(3), abs=1e-6)
    seen, _ = first(**fields_of("agreement", range(1, 7), 3, SINGLE))
    assert seen.quantity.startswith("predicted probability") and 0 < seen.measured[0].value < 1
    assert first(policy="never") == (None, 6)
    assert first(policy="fixed_depth", depth=4) == (None, 4)


def test_exits_behind_the_answer_are_what_would_have_come() -> None:
    found = explain(reading(ROW), policy="fixed_depth", depth=2)
    assert [step.reached for step in found.steps] == [True, True, False, False, False, False]
    for step, row in zip(found.steps, ROW, strict=True):
        assert step.probabilities is not None
        assert step.probabilities.tolist() == pytest.approx(softmax(row), abs=1e-6)


def test_more_than_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="one row at a time"):
        explain(read_exits(make_badge(), make_batch(2)))
