"""The curve that `calibrate` stores: every point is what a replay measures, and the chosen setting is one of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation import evaluate_policy
from badge_peft.evaluation.curve import POINTS, curve_record, setting_curve, stored_curve, stored_promises

from .logits import MULTI, REGRESSION, SINGLE, plausible
from .test_calibration import metric_of, quiet

CASES = [
    (SINGLE, {"policy": "divergence", "window": "consecutive"}),
    (SINGLE, {"policy": "entropy", "max_exit": 9}),
    (SINGLE, {"policy": "patience"}),
    (SINGLE, {"policy": "fixed_depth", "depth": 5}),
    (SINGLE, {"policy": "agreement"}),
    (MULTI, {"policy": "divergence", "divergence": "js"}),
    (REGRESSION, {"policy": "divergence"}),
]


@pytest.mark.parametrize(("problem_type", "policy"), CASES)
def test_what_calibrate_stored_is_what_a_replay_measures(problem_type, policy):
    exit_logits, metric = plausible(problem_type, 1 if problem_type == REGRESSION else 4), metric_of(problem_type)
    chosen = quiet(exit_logits, policy, target_blocks_saved=0.3, metric=metric)
    again = EarlyExitConfig.of(json.loads(json.dumps(chosen.to_dict())))
    points = stored_curve(again)
    speeds = [p.blocks_saved for p in points]
    assert 2 <= len(points) <= POINTS + 1 and speeds == sorted(set(speeds))
    for point in points:
        measured = evaluate_policy(exit_logits, point.config, metric)
        assert (measured.mean_exit, measured.score) == (point.mean_exit, point.score)
        same = replace(point.config, threshold=chosen.threshold, patience=chosen.patience, depth=chosen.depth)
        assert same == replace(chosen, calibration=None)
    assert replace(chosen, calibration=None) in [p.config for p in points]


def test_promises_are_of_their_exits_when_the_file_has_sorted_its_names():
    """PEFT writes adapter_config.json with sorted keys: "10" comes before "2"."""
    chosen = quiet(plausible(), "entropy", target_blocks_saved=0.3)
    again = EarlyExitConfig.of(json.loads(json.dumps(chosen.to_dict(), sort_keys=True)))
    assert stored_promises(again) == stored_promises(chosen)
    assert stored_curve(again) == stored_curve(chosen)
    assert list(again.calibration["exit_scores"]) == [str(m) for m in range(1, 13)]


def test_a_setting_that_cannot_vary_is_its_own_curve():
    exit_logits = plausible()
    point = evaluate_policy(exit_logits, {"policy": "never"})
    assert setting_curve(exit_logits, point.config) == [point]


def test_another_threshold_loses_the_curve_with_the_rest_of_the_record():
    exit_logits = plausible()
    chosen = quiet(exit_logits, "entropy", target_blocks_saved=0.3)
    assert curve_record(exit_logits, stored_curve(chosen)) == chosen.calibration["curve"]
    with pytest.raises(ValueError, match="no trade-off curve is stored with policy='entropy'"):
        stored_curve(replace(chosen, threshold=0.123))
