"""Rules that trust one exit's own confidence: their defaults, their ends, extreme logits, and temperatures live.

What they stop at on ordinary logits is compared with loops in `test_policies.py`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import build_policy

from .reference import MULTI, SINGLE, distributions, entropy
from .table_model import as_inputs, table_model

NAMES = ("entropy", "max_prob", "confident_patience")


def signals(name, logits, problem_type=SINGLE, **fields):
    """[E, N] of a rule on logits [N, E, K]."""
    history = ExitHistory.of(np.asarray(logits, np.float32), range(1, len(logits[0]) + 1), problem_type)
    rule = build_policy(policy=name, **fields)
    return np.stack([rule.score(history, j) for j in range(len(logits[0]))])


def between(logit):
    """Rows of two exits with the logits (v, 0) and (0, v), v from 0 to `logit`."""
    v = np.linspace(0, logit, 41, dtype=np.float32)
    zero = np.zeros_like(v)
    return np.stack([np.stack([v, zero], -1), np.stack([zero, v], -1)], axis=1)


@pytest.mark.parametrize(
    ("name", "problem_type", "num_labels", "written"),
    [
        ("entropy", SINGLE, 2, {"threshold": 0.3 * math.log(2)}),
        ("entropy", SINGLE, 77, {"threshold": 0.3 * math.log(77)}),
        ("entropy", MULTI, 5, {"threshold": 0.3 * 5 * math.log(2)}),
        ("max_prob", SINGLE, 2, {"threshold": 0.9}),
        ("max_prob", SINGLE, 4, {"threshold": 0.7}),
        ("max_prob", SINGLE, 80, {"threshold": 0.51}),
        ("max_prob", MULTI, 5, {"threshold": 0.9}),
        ("confident_patience", SINGLE, 2, {"threshold": 0.4, "patience": 2}),
        ("confident_patience", SINGLE, 77, {"threshold": 0.4, "patience": 2}),
        ("confident_patience", MULTI, 5, {"threshold": 0.4, "patience": 2}),
    ],
)
def test_documented_defaults(name, problem_type, num_labels, written):
    logits = np.random.default_rng(0).normal(scale=4.0, size=(400, 5, num_labels)).astype(np.float32)
    default = build_policy(policy=name).replay(logits, problem_type=problem_type)
    assert default.tolist() == build_policy(policy=name, **written).replay(logits, problem_type=problem_type).tolist()
    assert 1 < len(default.unique())
    for change in (0.9, 1.1):
        other = {**written, "threshold": change * written["threshold"]}
        assert (
            default.tolist() != build_policy(policy=name, **other).replay(logits, problem_type=problem_type).tolist()
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), min_size=3, max_size=3))
def test_signals_are_the_formulas(name, problem_type, row):
    most = math.log(3) if problem_type == SINGLE else 3 * math.log(2)
    ps = [distributions(x, problem_type) for x in row]
    h = [sum(entropy([max(v, 1e-300) for v in p]) for p in exit_) for exit_ in ps]
    want = {
        "entropy": h,
        "max_prob": [min(max(p) for p in exit_) for exit_ in ps],
        "confident_patience": [np.inf, *(max(h[j - 1], h[j]) / most for j in (1, 2))],
    }[name]
    found = signals(name, [row], problem_type)[:, 0]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_the_most_certain_rows_stop_and_the_least_certain_go_on(problem_type, name, dtype):
    """Logits of 1e4 either way: certain. All equal: not, however large (multi-label: zero)."""
    certain = torch.tensor([[1e4, -1e4, -1e4], [-1e4, 1e4, 1e4 if problem_type == MULTI else -1e4]])
    unsure = torch.zeros(3) if problem_type == MULTI else torch.full((3,), 1e4)
    logits = torch.stack([torch.stack([x] * 4) for x in (*certain, unsure)]).to(dtype)  # [3, 4, 3]
    first = 2 if name == "confident_patience" else 1
    for fields in ({}, {"temperature": [0.1, 1.0, 3.0, 100.0]}):
        stops = build_policy(policy=name, **fields).replay(logits, problem_type=problem_type)
        assert stops.tolist() == [first, first, 4]
        assert not np.isnan(signals(name, logits.float().numpy(), problem_type, **fields)).any()


def test_ends():
    """Entropy and its share stop below the threshold, a probability at it."""
    logits = [[[0.0, 0.0]] * 3]
    half, most = 0.5, float(np.float32(math.log(2)))
    exact = float(signals("entropy", logits)[0, 0])
    assert exact == pytest.approx(most, abs=1e-6)
    assert build_policy(policy="entropy", threshold=exact).replay(logits).tolist() == [3]
    assert build_policy(policy="entropy", threshold=exact + 1e-6).replay(logits).tolist() == [1]
    assert build_policy(policy="max_prob", threshold=half).replay(logits).tolist() == [1]
    assert build_policy(policy="max_prob", threshold=half + 1e-6).replay(logits).tolist() == [3]
    for name in ("entropy", "confident_patience"):
        assert build_policy(policy=name, threshold=0.0).replay(between(30.0)).tolist() == [2] * 41
    assert build_policy(policy="max_prob", threshold=1.5).replay(between(30.0)).tolist() == [2] * 41


def test_confident_patience_wants_them_in_a_row():
    sure, unsure = [9.0, 0.0], [0.0, 0.0]
    logits = np.array([[sure, unsure, sure, sure, unsure], [sure] * 5, [unsure, sure, unsure, sure, unsure]])
    stops = {t: build_policy(policy="confident_patience", patience=t).replay(logits).tolist() for t in (1, 2, 3, 5, 6)}
    assert stops == {1: [1, 1, 2], 2: [4, 2, 5], 3: [5, 3, 5], 5: [5, 5, 5], 6: [5, 5, 5]}


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("final_exit", ["exit", "base_head"])
def test_temperatures_live_are_those_of_the_replay(final_exit, problem_type):
    blocks, exits = 4, (0, 1, 2, 3, 4)
    logits = 3 * torch.randn(13, blocks + 1, 3, generator=torch.Generator().manual_seed(0))
    logits[:2] *= 1e4
    model = table_model(3, problem_type, exits, blocks, final_exit)
    rule = {"policy": "max_prob", "threshold": 0.8, "temperature": [0.5, 2.0, 5.0, 0.9, 1.0]}
    want = build_policy(rule).replay(logits, exits, problem_type)
    out = model.early_exit_forward(**as_inputs(logits), early_exit_config=rule)
    assert out.exit_layer.tolist() == want.tolist() and len(want.unique()) > 2
    plain = build_policy(rule, temperature=None).replay(logits, exits, problem_type)
    assert plain.tolist() != want.tolist()
    with pytest.raises(ValueError, match="temperature has 4 numbers, but there are 5 exits"):
        model.early_exit_forward(**as_inputs(logits), early_exit_config={**rule, "temperature": [1.0] * 4})
