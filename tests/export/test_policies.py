"""The ONNX form of every policy against its `replay`: same exits and answers, with values that come with the call."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.history import as_history
from badge_peft.early_exit.policies import EntropyPolicy, ThresholdPolicy, build_policy
from badge_peft.export.policies import Decision
from badge_peft.export.runtime import threshold_input
from tests.early_exit.reference import MULTI, REGRESSION, SINGLE
from tests.early_exit.rules import NO_REGRESSION, fields_of
from tests.export.table import TableGraph
from tests.labels import label

ROWS, EXITS = 60, 6
PROBLEMS = (SINGLE, MULTI, REGRESSION)
COUNTING = ("divergence", "patience", "confident_patience")
RULES: list[dict[str, Any]] = [
    *({"divergence": k, "window": w} for k in ("ce", "kl", "js", "label") for w in ("all", "consecutive")),
    {"policy": "patience"},
    {"policy": "entropy"},
    {"policy": "max_prob"},
    {"policy": "max_prob", "temperature": [2.0, 1.5, 1.0, 0.8, 1.2, 1.0]},
    {"policy": "learned"},
    {"policy": "confident_patience"},
    {"policy": "agreement"},
]
CASES = [
    (rule, problem)
    for rule, problem in itertools.product(RULES, PROBLEMS)
    if not (problem == REGRESSION and rule.get("policy") in NO_REGRESSION)
]


@cache
def logits_of(problem: str, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    """[N, E, K]: exits that agree more and more."""
    rng = np.random.default_rng(seed)
    final = rng.normal(scale=scale, size=(ROWS, 1, 1 if problem == REGRESSION else 4))
    noise = rng.normal(size=(ROWS, EXITS, final.shape[2])) * rng.uniform(0.1, 2.0, size=(ROWS, 1, 1))
    return (final + noise * np.linspace(1.0, 0.2, EXITS)[None, :, None]).astype(np.float32)


@cache
def doubts_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(ROWS, EXITS)).astype(np.float32)


def full_rule(rule: dict[str, Any], problem: str, logits: np.ndarray) -> dict[str, Any]:
    name = rule.get("policy", "divergence")
    return {**rule, **fields_of(name, list(range(1, EXITS + 1)), logits.shape[2], problem)}


def thresholds(rule: dict[str, Any], problem: str, logits: np.ndarray) -> list[float]:
    """Three thresholds that stop few, some and many rows, each in a gap that rounding cannot bridge."""
    policy = build_policy(rule)
    assert isinstance(policy, ThresholdPolicy)
    history = as_history(logits, None, problem, doubts_of())
    signals = np.concatenate([policy.score(history, j) for j in range(EXITS - 1)])
    values = np.unique(signals[np.isfinite(signals)]).astype(np.float64)
    if len(values) < 3 or rule.get("divergence") == "label" or rule.get("policy") == "patience":
        return [0.5]
    middles, gaps = (values[1:] + values[:-1]) / 2, np.diff(values)
    middles = middles[gaps > 1e-4 * np.maximum(1, np.abs(middles))]
    return [float(middles[np.abs(middles - np.quantile(values, q)).argmin()]) for q in (0.2, 0.5, 0.8)]


@pytest.mark.parametrize(("rule", "problem"), CASES, ids=label)
def test_as_replay(rule, problem):
    logits = logits_of(problem)
    rule = full_rule(rule, problem, logits)
    graph = TableGraph(rule, EXITS, logits.shape[2], problem)
    seen = set()
    for tau in thresholds(rule, problem, logits):
        for t in (1, 2, 3) if rule.get("policy", "divergence") in COUNTING else (1,):
            wanted = build_policy({**rule, "threshold": tau, "patience": t}).replay(logits, None, problem, doubts_of())
            answers, exits = graph(logits, tau, t, doubts_of())
            np.testing.assert_array_equal(exits, wanted.numpy())
            np.testing.assert_array_equal(answers, logits[np.arange(ROWS), exits - 1])
            seen |= set(exits.tolist())
    assert len(seen) > 2  # rows did stop at different blocks


@pytest.mark.parametrize(("rule", "problem"), CASES, ids=label)
def test_a_threshold_for_each_exit(rule, problem):
    """Those of the file, and others with the call."""
    logits = logits_of(problem)
    rule = full_rule(rule, problem, logits)
    found = thresholds(rule, problem, logits)
    taus = [found[j % len(found)] for j in range(EXITS)]
    graph = TableGraph({**rule, "threshold": taus}, EXITS, logits.shape[2], problem)
    counts = build_policy(rule).counts_exits
    takes = build_policy(rule).uses_threshold(problem)
    for own, t in ((None, 1), (taus[::-1], 2), ([found[0]] * EXITS, 1)):
        t = t if counts else 1
        chosen = {**rule, "threshold": taus if own is None else own, "patience": t}
        _, exits = graph(logits, own if takes else None, t, doubts_of())
        np.testing.assert_array_equal(exits, build_policy(chosen).replay(logits, None, problem, doubts_of()).numpy())


def test_what_an_exported_file_takes():
    one, many = 0.5, [0.5, 0.25, 1.0]
    assert threshold_input(one, 2) == 2 and threshold_input(one, 2).shape == ()
    assert threshold_input(many, 2).tolist() == [2, 2, 2] and threshold_input(many, [1, 2, 3]).tolist() == [1, 2, 3]
    for own, taus in ((one, [1.0]), (one, "a"), (many, [1.0]), (many, [1, 2, float("nan")]), (many, [[1, 2, 3]])):
        with pytest.raises(ValueError, match="is not allowed: it must be a finite number"):
            threshold_input(own, taus)


@pytest.mark.parametrize(
    "rule",
    [
        {"policy": "fixed_depth", "depth": 3},
        {"policy": "never"},
        {"policy": "never", "max_exit": 4},
        {"policy": "max_prob", "threshold": 0.0},
        {"policy": "max_prob", "threshold": 0.6, "min_exit": 3},
        {"policy": "divergence", "threshold": 0.9, "max_exit": 4},
        {"policy": "divergence", "threshold": 0.9, "decide_every": 2},
        {"policy": "patience", "patience": 2, "decide_every": 2},
        {"policy": "max_prob", "threshold": 0.6, "decide_every": 4},
        {"policy": "divergence", "threshold": 0.9, "min_exit": 3, "max_exit": 5, "patience": 2},
    ],
    ids=label,
)
def test_limits(rule):
    logits = logits_of(SINGLE)
    graph = TableGraph(rule, EXITS, logits.shape[2], SINGLE)
    _, exits = graph(logits, None, rule.get("patience", 1))
    np.testing.assert_array_equal(exits, build_policy(rule).replay(logits).numpy())


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_row_alone_and_among_others(problem):
    logits = logits_of(problem, seed=5)
    graph = TableGraph({"policy": "divergence"}, EXITS, logits.shape[2], problem)
    answers, exits = graph(logits, 0.8, 1)
    for i in range(0, ROWS, 7):
        answer, alone = graph(logits[i : i + 1], 0.8, 1)
        assert alone[0] == exits[i]
        np.testing.assert_array_equal(answer[0], answers[i])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 1.0, 20.0]), st.integers(1, 6), st.floats(0.05, 2.0))
def test_any_logits(seed, scale, patience, tau):
    """Random sharpness, any patience; rows whose signal is within rounding of tau are left aside."""
    logits = logits_of(SINGLE, seed, scale)
    policy = build_policy({"policy": "divergence", "threshold": tau, "patience": patience})
    history = as_history(logits, None, SINGLE)
    signals = np.stack([policy.score(history, j) for j in range(EXITS)])
    safe = (np.abs(signals - tau) > 1e-4).all(axis=0)
    _, exits = _divergence_graph()(logits, tau, patience)
    np.testing.assert_array_equal(exits[safe], policy.replay(logits).numpy()[safe])


@cache
def _divergence_graph():
    return TableGraph({"policy": "divergence"}, EXITS, 4, SINGLE)


@pytest.mark.parametrize("rule", [r for r in RULES if r.get("policy") != "learned"], ids=label)
def test_huge_logits_give_numbers(rule):
    logits = logits_of(SINGLE) * np.float32(1e4)
    logits[3, 2, 1], logits[4, 1, 0] = np.inf, -np.inf
    rule = full_rule(rule, SINGLE, logits)
    graph = TableGraph(rule, EXITS, 4, SINGLE)
    _, exits = graph(logits, None, 2)
    wanted = build_policy({**rule, "patience": 2}).replay(logits).numpy()
    assert (exits == wanted).mean() > 0.9  # a threshold may lie on a signal that is 0 or 1 to rounding
    assert set(exits.tolist()) <= set(range(1, EXITS + 1))


def test_defaults_are_those_of_the_policy():
    for rule, problem in CASES:
        logits = logits_of(problem)
        policy = build_policy(full_rule(rule, problem, logits))
        decision = Decision(policy, list(range(1, EXITS + 1)), logits.shape[2], problem)
        assert decision.threshold == pytest.approx(policy.threshold(logits.shape[2], problem))


def test_somebody_elses_policy_is_refused():
    class Mine(EntropyPolicy):
        def score(self, history, j):
            return history.entropy(j) / 2

    with pytest.raises(ValueError, match="Mine cannot be exported"):
        Decision(Mine(), [1, 2], 3, SINGLE).check_exportable(learned=False)
