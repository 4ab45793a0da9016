"""Which settings are tried, and that the fast path to their exits is the policies' own replay."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.base import policy_label
from badge_peft.evaluation import candidates
from badge_peft.evaluation.candidates import families
from badge_peft.evaluation.exit_logits import ExitLogits

from .logits import EXITS, KINDS, MULTI, REGRESSION, SINGLE, SIZES, plausible, strange

PROBLEMS = [(SINGLE, 2), (SINGLE, 4), (MULTI, 3), (REGRESSION, 1)]
ON_DISTRIBUTIONS = ("entropy", "max_prob", "confident_patience")
NAMES = ("divergence", "patience", "learned", "agreement", "fixed_depth", "never", *ON_DISTRIBUTIONS)


def fields_of(config):
    return {k: v for k, v in config.to_dict().items() if v != getattr(EarlyExitConfig(), k)}


@st.composite
def templates(draw, problem_type, exits):
    """Any config that leaves something open."""
    names = [n for n in NAMES if problem_type != REGRESSION or n not in ON_DISTRIBUTIONS]
    name = draw(st.sampled_from(names))
    low = draw(st.none() | st.sampled_from(exits))
    high = draw(st.none() | st.sampled_from([m for m in exits if m >= (low or 0)]))
    config = {"policy": name, "min_exit": low, "max_exit": high}
    config["divergence"] = draw(st.sampled_from(["ce", "kl", "js", "label"]))
    config["window"] = draw(st.sampled_from(["all", "consecutive"]))
    config["patience"] = draw(st.none() | st.integers(1, 5))
    if name == "fixed_depth":
        config["depth"] = exits[-1]
    if name == "max_prob" and draw(st.booleans()):
        config["temperature"] = [1.0 + 0.3 * j for j in range(len(exits))]
    return config


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_the_fast_path_is_the_replay(problem_type, num_labels, data):
    exits = data.draw(st.sampled_from(EXITS))
    rows, kind = data.draw(st.integers(1, 30)), data.draw(st.sampled_from(KINDS))
    stored = strange(problem_type, num_labels, rows, exits, kind, data.draw(st.integers(0, 99)))
    template = data.draw(templates(problem_type, exits))
    if template["policy"] == "agreement":
        template["min_exit"] = None  # the best exit may be shallower
    history = stored.history()
    for family in families(template, stored):
        for config, stops in candidates.settings(family, history, 12):
            assert stops.tolist() == build_policy(config).replay(stored).tolist(), config
            assert set(stops.tolist()) <= set(exits)
            saved = EarlyExitConfig.of(json.loads(json.dumps(config.to_dict())))
            assert stops.tolist() == build_policy(saved).replay(stored).tolist()


@pytest.mark.parametrize(
    ("name", "problem_type", "num_labels"),
    [(name, *size) for name in ("divergence", "learned", *ON_DISTRIBUTIONS) for size in SIZES]
    + [("agreement", SINGLE, 3), ("agreement", REGRESSION, 1)],
)
def test_settings_go_from_slow_to_fast_and_differ(name, problem_type, num_labels):
    if problem_type == REGRESSION and name in ON_DISTRIBUTIONS:
        name = "patience"
    stored = plausible(problem_type, num_labels)
    found = candidates.settings(families({"policy": name}, stored)[0], stored.history(), 15)
    assert 10 <= len(found) <= 15
    for config, stops in found:  # saturated probabilities lie on their threshold: no float is between them
        assert stops.tolist() == build_policy(config).replay(stored).tolist()
    means = [stops.mean() for _, stops in found]
    assert all(a > b for a, b in zip(means, means[1:], strict=False))
    thresholds = [config.threshold for config, _ in found]
    assert len(set(thresholds)) == len(found)
    signals = np.minimum.accumulate(candidates.decided_scores(build_policy(found[0][0]), stored.history()))
    on_it = np.isin(np.abs(signals), np.abs(np.float32(thresholds)))
    assert not (on_it & (np.abs(signals) < 0.999)).any()  # no row is; next to 1 there may be no float between two rows


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_at_most_as_many_as_asked_for(count):
    stored = plausible()
    found = candidates.settings(EarlyExitConfig(policy="entropy"), stored.history(), count)
    assert 1 <= len(found) <= count and (count < 3 or len(found) >= count - 1)


@pytest.mark.parametrize("policy", ["entropy", "max_prob", "divergence"])
@pytest.mark.parametrize("every", [2, 3])
def test_decide_every_is_searched_as_it_is_replayed(policy, every):
    stored = plausible(rows=30, exits=6)
    found = candidates.settings(EarlyExitConfig(policy=policy, patience=1, decide_every=every), stored.history(), 6)
    assert len(found) > 1
    for config, stops in found:
        assert config.decide_every == every
        assert stops.tolist() == build_policy(config).replay(stored).tolist()
        assert set(stops.tolist()) <= {every, 2 * every, 6}


@pytest.mark.parametrize(
    ("policy", "exits", "expected"),
    [
        ("divergence", 6, [{"patience": t} for t in (1, 2, 3, 4)]),
        ("divergence", 3, [{"patience": t} for t in (1, 2)]),
        ("divergence", 1, [{"patience": 1}]),
        ({"policy": "divergence", "divergence": "js", "patience": 3}, 6, [{"divergence": "js", "patience": 3}]),
        ("confident_patience", 3, [{"policy": "confident_patience", "patience": t} for t in (1, 2)]),
        ("entropy", 6, [{"policy": "entropy"}]),
        ("patience", 6, [{"policy": "patience"}]),
        (EarlyExitConfig(policy="max_prob", min_exit=2), 6, [{"policy": "max_prob", "min_exit": 2}]),
    ],
    ids=str,
)
def test_families(policy, exits, expected):
    found = families(policy, strange(SINGLE, 3, 20, list(range(1, exits + 1)), "plain", 0))
    assert [fields_of(config) for config in found] == expected


def test_patience_on_values_is_tried_with_several_thresholds():
    stored = plausible(REGRESSION, 1, rows=60)
    found = [families(policy, stored) for policy in ("patience", {"policy": "patience", "patience": 3})]
    assert [[c.patience for c in f] for f in found] == [[1, 2, 3, 4], [3]]
    tried = [c for family in found[0] for c, _ in candidates.settings(family, stored.history(), 15)]
    assert all(len({c.threshold for c in tried if c.patience == t}) >= 10 for t in (1, 2, 3, 4))
    assert {policy_label(c) for c in tried} == {f"patience t={t}" for t in (1, 2, 3, 4)}
    closed = families({"policy": "patience", "threshold": 0.3}, stored)
    assert [(c.patience, c.threshold) for c in closed] == [(t, 0.3) for t in (1, 2, 3, 4)]


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
@pytest.mark.parametrize("signals", [True, False])
def test_auto_is_every_policy(problem_type, num_labels, signals):
    stored = strange(problem_type, num_labels, 40, [1, 2, 3, 4, 5], "plain", 1)
    stored.uncertainty = stored.uncertainty if signals else None
    found = families("auto", stored)
    kinds = {(c.policy, c.divergence, c.window) for c in found}
    divergences = ("ce",) if problem_type == REGRESSION else ("ce", "kl", "js", "label")
    expected = {("divergence", d, w) for d in divergences for w in ("all", "consecutive")}
    names = {"patience", "agreement"} | ({"learned"} if signals else set())
    names |= set() if problem_type == REGRESSION else set(ON_DISTRIBUTIONS)
    assert kinds == expected | {(name, "ce", "all") for name in names}
    best = {c.max_exit for c in found if c.max_exit is not None}
    capped = {(c.policy, c.divergence, c.window) for c in found if c.max_exit is not None}
    assert len(best) == 1 and capped == (kinds if best != {5} else {("agreement", "ce", "all")})
    for family in found:  # and each can be worked out
        for config, stops in candidates.settings(family, stored.history(), 3):
            assert len(stops) == 40 and config.policy == family.policy


def test_agreement_is_fitted_for_an_exit_that_may_answer():
    """The best of the rows lies before `min_exit`, on all of them or on the part that a fold chooses on."""
    stored = ExitLogits(torch.tensor([[[9.0, 0], [0, 9], [9, 0]], [[9, 0], [9, 0], [0, 9]]]), torch.tensor([0, 0]))
    assert [candidates.best_exit(stored, m) for m in (0, 1, 2, 3, 4)] == [1, 1, 2, 3, 3]
    (found,) = families({"policy": "agreement", "min_exit": 2}, stored)
    assert (found.min_exit, found.max_exit, found.parameters["reference"]) == (2, 2, 2)


@pytest.mark.parametrize("cap", [0, 1, 3])
def test_a_cap_of_the_user_stays(cap):
    stored = strange(SINGLE, 3, 60, [0, 1, 2, 3], "plain", 3)
    for name in ("agreement", "entropy", "divergence"):
        for family in families({"policy": name, "max_exit": cap}, stored):
            assert family.max_exit == cap
            assert all((stops <= cap).all() for _, stops in candidates.settings(family, stored.history(), 5))


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({}, "divergence"),
        ({"patience": 2}, "divergence t=2"),
        ({"divergence": "kl", "window": "consecutive", "patience": 1}, "divergence-kl-consecutive t=1"),
        ({"divergence": "label"}, "divergence-label"),
        ({"policy": "patience", "patience": 3}, "patience"),
        ({"policy": "confident_patience", "patience": 2}, "confident_patience t=2"),
        ({"policy": "max_prob", "threshold": 0.3}, "max_prob"),
        ({"policy": "fixed_depth", "depth": 3}, "fixed_depth"),
    ],
)
def test_labels(config, label):
    assert policy_label(EarlyExitConfig.of(config)) == label


def test_a_setting_that_is_closed_is_the_only_one():
    stored = plausible(rows=50)
    config = EarlyExitConfig(policy="entropy", threshold=0.4)
    assert [c for c, _ in candidates.settings(config, stored.history(), 20)] == [config]
    closed = EarlyExitConfig(policy="patience", patience=3)
    assert [c for c, _ in candidates.settings(closed, stored.history(), 20)] == [closed]
    assert [c.policy for c, _ in candidates.settings(EarlyExitConfig(policy="never"), stored.history(), 20)] == [
        "never"
    ]


def test_patience_and_fixed_depth_are_tried_whole():
    stored = plausible(rows=50, exits=6)
    found = candidates.settings(EarlyExitConfig(policy="patience"), stored.history(), 2)
    assert [c.patience for c, _ in found] == [5, 4, 3, 2, 1]
    found = candidates.settings(EarlyExitConfig(policy="fixed_depth", depth=6), stored.history(), 2)
    assert [(c.depth, set(stops.tolist())) for c, stops in found] == [(m, {m}) for m in (6, 5, 4, 3, 2, 1)]
