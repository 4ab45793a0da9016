"""Sweeps: enough points, well spread, with the fixed depths beside them; each point is what a replay measures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import TradeOff, TradeOffPoint, evaluate_policy, exit_scores, sweep
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import score

from .logits import MULTI, REGRESSION, SINGLE, SIZES, plausible, strange

WINDOWS = ("all", "consecutive")
ON_VALUES = [  # these suit regression, too
    *({"policy": "divergence", "window": w} for w in WINDOWS),
    {"policy": "divergence", "patience": 2},
    {"policy": "learned"},
    {"policy": "agreement"},
]
THRESHOLD_POLICIES = [
    *ON_VALUES,
    *({"policy": "divergence", "divergence": d, "window": w} for d in ("kl", "js") for w in WINDOWS),
    *({"policy": name} for name in ("entropy", "max_prob", "confident_patience")),
]
SWEPT = [(policy, *size) for policy in THRESHOLD_POLICIES for size in SIZES if size[0] != REGRESSION]
SWEPT = [case for case in SWEPT if case[0]["policy"] != "agreement" or case[2] in (3, 6)]  # it has to be fitted
SWEPT += [(policy, REGRESSION, 1) for policy in (*ON_VALUES, {"policy": "patience"})]


def metric_of(problem_type):
    return "pearson" if problem_type == REGRESSION else "accuracy"


@pytest.mark.parametrize(
    ("policy", "problem_type", "num_labels"),
    SWEPT,
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else str(x),
)
def test_twenty_points_spread_over_the_speed_ups(policy, problem_type, num_labels):
    stored = plausible(problem_type, num_labels)
    found = sweep(stored, [policy], metric=metric_of(problem_type))
    points = [p for p in found.points if p.config.policy != "fixed_depth"]
    speed_ups = sorted({p.blocks_saved for p in points})
    assert len(points) == 20 and len(speed_ups) == 20
    assert np.diff(speed_ups).max() < 3 * (speed_ups[-1] - speed_ups[0]) / 19 + 0.01
    assert speed_ups[0] < 0.1 or policy["policy"] == "agreement"  # which goes no further than the best exit
    assert speed_ups[-1] > 0.5


@pytest.mark.parametrize("exits", [[1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 2, 5]], ids=str)
@pytest.mark.parametrize(
    "policies", [[], ["entropy"], ["fixed_depth"], None, [{"policy": "divergence", "divergence": "kl"}]]
)
def test_the_fixed_depths_are_always_there(policies, exits):
    stored = strange(SINGLE, 3, 60, exits, "plain", 0)
    found = sweep(stored, policies)
    line = found.points[: len(exits)]
    assert [p.name for p in line] == ["fixed_depth"] * len(exits)
    assert [p.config.depth for p in line] == exits[::-1]
    assert sum(p.name == "fixed_depth" for p in found.points) == len(exits)
    scores = dict(zip(exits, exit_scores(stored).per_exit, strict=True))
    for point in line:
        assert point.mean_exit == point.config.depth
        assert point.blocks_saved == pytest.approx(1 - point.config.depth / exits[-1])
        assert point.score == scores[point.config.depth]


@pytest.mark.parametrize(("problem_type", "num_labels"), SIZES)
def test_each_point_is_what_a_replay_measures(problem_type, num_labels):
    stored = plausible(problem_type, num_labels, rows=120, exits=6)
    metric = metric_of(problem_type)
    found = sweep(stored, points=7, metric=metric)
    for point in found.points:
        again = evaluate_policy(stored, point.config, metric, point.name)
        assert again == point
        stops = build_policy(point.config).replay(stored)
        assert point.mean_exit == pytest.approx(stops.double().mean().item())
        assert point.score == score(stored, stored.answers(stops), metric)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "names"),
    [
        (SINGLE, 3, ["fixed_depth", "divergence", "patience", "entropy", "max_prob"]),
        (MULTI, 6, ["fixed_depth", "divergence", "patience", "entropy", "max_prob"]),
        (REGRESSION, 1, ["fixed_depth", "divergence", "patience"]),
    ],
)
def test_policies_that_are_swept_unasked(problem_type, num_labels, names):
    found = sweep(plausible(problem_type, num_labels, rows=60), metric=metric_of(problem_type))
    assert found.names == names
    assert found.num_blocks == 12 and found.metric == metric_of(problem_type)


def test_the_configs_of_the_user_are_kept():
    stored = plausible(rows=80)
    template = EarlyExitConfig(divergence="js", patience=2, min_exit=3, max_exit=9)
    found = sweep(stored, [template, {"policy": "patience", "max_exit": 6}], points=9)
    points = [p for p in found.points if p.name == "divergence-js t=2"]
    assert 5 < len(points) <= 9
    for point in points:
        assert {**point.config.to_dict(), "threshold": None} == template.to_dict()
        stops = build_policy(point.config).replay(stored)
        assert stops.min() >= 3 and stops.max() <= 9
    assert all(p.mean_exit <= 6 for p in found.points if p.name == "patience")
    assert template.threshold is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sweep(ExitLogits(x.logits)), r"no labels.*exit_logits\.labeled\(\)"),
        (lambda x: sweep(x, ["guess"]), "policy='guess' is not allowed"),
        (
            lambda x: sweep(ExitLogits(x.logits[..., :1], x.labels.float()), ["max_prob"], metric="pearson"),
            "a distribution",
        ),
        (lambda x: sweep(x, metric="bleu"), "metric='bleu' is not allowed"),
        (lambda x: sweep(x, metric="pearson"), "metric='pearson' does not suit"),
        (lambda x: sweep(ExitLogits(x.logits, x.labels), ["learned"]), "LTE layer"),
        (lambda x: sweep(x, [{"policy": "entropy", "max_exit": 13}]), "max_exit=13 is not allowed"),
        (lambda x: evaluate_policy(x, {"policy": "fixed_depth", "depth": 13}), "depth=13 is not allowed"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call(plausible(rows=20))


POINTS = [
    TradeOffPoint("a", EarlyExitConfig(policy="entropy", threshold=t), 12 * (1 - s), s, score)
    for t, s, score in ((0.1, 0.2, 0.9), (0.3, 0.6, 0.7), (0.2, 0.4, 0.8), (0.4, 0.7, 0.7))
]


def test_curves():
    found = TradeOff([*POINTS, TradeOffPoint("b", EarlyExitConfig(), 6.0, 0.5, 0.5)], "accuracy", 12)
    assert found.names == ["a", "b"]
    assert [p.blocks_saved for p in found.curve("a")] == [0.2, 0.4, 0.6, 0.7]
    assert found.best_at("a", 0.0).score == 0.9 and found.best_at("a", 0.4).score == 0.8
    assert found.best_at("a", 0.41).blocks_saved == 0.7  # of equal scores the faster
    assert found.best_at("a", 0.71) is None and found.best_at("c", 0.0) is None


def test_rounding_does_not_keep_a_depth_from_its_own_speedup():
    found = sweep(plausible(rows=30, exits=5), ["never"])
    assert 1 - 4 / 5 < 0.2  # in floating point
    assert TradeOff(found.curve("fixed_depth")[:2], "accuracy", 5).best_at("fixed_depth", 0.2).config.depth == 4


def test_variants_of_a_policy_have_curves_of_their_own():
    variants = [{}, {"min_exit": 3}, {"max_exit": 3}, {"decide_every": 2, "max_exit": 4}]
    found = sweep(plausible(rows=60, exits=5), [{"policy": "entropy", **fields} for fields in variants], points=4)
    names = ["entropy", "entropy, min_exit=3", "entropy, max_exit=3", "entropy, max_exit=4, decide_every=2"]
    assert found.names == ["fixed_depth", *names]
    for name, fields in zip(names, variants, strict=True):
        assert 0 < len(found.curve(name)) <= 4
        assert all(point.to_dict().items() >= fields.items() for point in found.curve(name))


@pytest.mark.parametrize("points", [0, -1, 2.5])
def test_a_sweep_has_a_whole_number_of_points(points):
    with pytest.raises(ValueError, match="points=.* must be a whole number of at least 1"):
        sweep(plausible(rows=30), points=points)


def test_files(tmp_path):
    found = TradeOff(POINTS, "accuracy", 12)
    assert found.to_dicts()[1] == {
        "name": "a",
        "policy": "entropy",
        "divergence": "ce",
        "threshold": 0.3,
        "window": "all",
        "mean_exit": pytest.approx(4.8),
        "blocks_saved": 0.6,
        "score": 0.7,
    }
    found.save(tmp_path / "sweep.json")
    read = json.loads((tmp_path / "sweep.json").read_text())
    assert read == {"metric": "accuracy", "num_blocks": 12, "points": found.to_dicts()}
