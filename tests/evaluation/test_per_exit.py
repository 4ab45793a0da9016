"""A threshold for each exit: against brute force, and taken only where rows that did not choose it say so."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import calibrate, evaluate_policy
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.per_exit import cost, descend, per_exit
from badge_peft.evaluation.tradeoff import search

from .logits import MULTI, REGRESSION, SINGLE, plausible


def by_hand(scores, costs, taus):
    """The mean cost, row by row."""
    total = 0.0
    for n in range(scores.shape[1]):
        stop = next((j for j in range(len(taus)) if scores[j, n] < taus[j]), len(taus))
        total += costs[stop, n]
    return total / scores.shape[1]


def problem(exits, rows, seed, whole=False):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(exits, rows)).astype(np.float32)
    scores = scores.round(1) if whole else scores
    scores[rng.random(scores.shape) < 0.1] = np.inf  # rows that may not stop there
    return scores, rng.random((exits + 1, rows)) + 0.1 * np.arange(exits + 1)[:, None]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 999), st.booleans(), st.floats(-2, 2))
def test_the_cost_never_rises(exits, rows, seed, whole, tau):
    scores, costs = problem(exits, rows, seed, whole)
    start = np.full(exits, tau)
    found = descend(scores, costs, start)
    assert np.isfinite(found).all() and start.tolist() == [tau] * exits
    assert cost(scores, costs, found) == pytest.approx(by_hand(scores, costs, found))
    assert cost(scores, costs, found) <= cost(scores, costs, start) + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_one_exit_is_cut_at_its_best(seed):
    scores, costs = problem(1, 25, seed, whole=seed % 2 == 1)
    found = cost(scores, costs, descend(scores, costs, np.zeros(1)))
    everywhere = [-9.0, *(scores[np.isfinite(scores)] + 0.01), 9.0]
    assert found == pytest.approx(min(by_hand(scores, costs, [tau]) for tau in everywhere))


def test_no_single_threshold_can_be_moved_to_a_lower_cost():
    scores, costs = problem(3, 30, 1)
    taus = descend(scores, costs, np.zeros(3))
    least = cost(scores, costs, taus)
    for j, tau in itertools.product(range(3), np.linspace(-3, 3, 121)):
        other = taus.copy()
        other[j] = tau
        assert by_hand(scores, costs, other) >= least - 1e-12


def overconfident(rows, seed=0):
    """Exits 1 and 3 know what they know; exit 2 is sure of itself, and wrong half of the time."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    sides = 2 * np.eye(2)[labels] - 1
    logits = np.zeros((rows, 4, 2))
    for j, (strength, noise) in enumerate([(1.0, 1.0), (0.0, 4.0), (2.0, 1.0), (4.0, 0.3)]):
        logits[:, j] = strength * sides + noise * rng.normal(size=(rows, 2))
    return ExitLogits(torch.tensor(logits).float(), torch.tensor(labels))


def chosen(stored, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate(stored, **options)


@pytest.mark.parametrize("goal", [{"max_score_drop": 0.03}, {"target_blocks_saved": 0.3}], ids=str)
@pytest.mark.parametrize("policy", ["max_prob", "entropy"])
def test_where_exits_differ_it_wins_on_new_rows(policy, goal):
    every = {"policy": policy, "exit_layers": [1, 2, 3]}  # else the one that is too sure is passed over
    one, each = (chosen(overconfident(1500), policy=every, per_exit=on, **goal) for on in (False, True))
    assert not isinstance(one.threshold, list)
    assert isinstance(each.threshold, list) or each.temperature is not None
    before, after = (evaluate_policy(overconfident(4000, seed=1), config) for config in (one, each))
    if "max_score_drop" in goal:
        assert after.blocks_saved > before.blocks_saved + 0.02 and after.score > before.score - 0.02
    else:
        assert after.score > before.score + 0.01


def test_it_is_not_taken_where_the_rows_are_few_and_exits_alike():
    """On so few rows four thresholds fit noise: what they save here they lose elsewhere."""
    taken = 0
    for seed in range(4):
        stored = plausible(SINGLE, 3, rows=60, exits=5, seed=seed)
        each, one = (chosen(stored, policy="entropy", max_score_drop=0.05, per_exit=on) for on in (True, False))
        taken += isinstance(each.threshold, list)
        if not isinstance(each.threshold, list) and each.temperature is None:
            assert each == one
    assert taken < 4


@pytest.mark.parametrize(("kind", "labels"), [(SINGLE, 4), (MULTI, 3), (REGRESSION, 1)])
@pytest.mark.parametrize(
    "policy", ["auto", "divergence", "entropy", "max_prob", "learned", "confident_patience", "patience"]
)
def test_every_policy_and_problem(policy, kind, labels):
    if kind == REGRESSION and policy in ("entropy", "max_prob", "confident_patience"):
        pytest.skip("values have no distribution")
    stored = plausible(kind, labels, rows=60, exits=4)
    metric = "pearson" if kind == REGRESSION else "accuracy"
    points = search(stored, policy, 8, metric, per_exit=True)
    lists = [p.config for p in points if isinstance(p.config.threshold, list)]
    assert bool(lists) == (policy not in ("patience", "confident_patience"))
    for config in lists:
        assert len(config.threshold) == 4 and build_policy(config).decides_alone
    for point in points:
        stops = build_policy(point.config).replay_history(stored.history())
        assert point.mean_exit == pytest.approx(float(stops.mean()))


def test_a_cap_is_kept():
    stored = plausible(SINGLE, 3, rows=100, exits=5)
    starts = [p.config for p in search(stored, {"policy": "entropy", "max_exit": 3, "min_exit": 2}, 8, "accuracy")]
    found = per_exit(starts, stored)
    assert found
    for config in found:
        stops = build_policy(config).replay_history(stored.history())
        assert set(stops.tolist()) <= {2, 3}
    assert (
        per_exit([p.config for p in search(stored, {"policy": "entropy", "max_exit": 1}, 8, "accuracy")], stored) == []
    )


def test_with_a_bound_for_new_data():
    config = calibrate(overconfident(2000), "max_prob", max_score_drop=0.05, confidence=0.9, per_exit=True)
    assert config.calibration["confidence"] == 0.9
    new = evaluate_policy(overconfident(4000, seed=2), config)
    full = evaluate_policy(overconfident(4000, seed=2), {"policy": "never"})
    assert full.score - new.score < 0.05
