"""The sliders: those that the rule has, no others, and the rule that they describe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from badge_peft.app.controls import Control, apply, controls_of
from badge_peft.early_exit.config import DIVERGENCES, EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from tests.early_exit.reference import MULTI, REGRESSION, SINGLE
from tests.early_exit.rules import NAMES, NO_REGRESSION, fields_of

EXITS = [1, 2, 3, 4, 6]


def opened_controls(kind: str = SINGLE, labels: int = 3, **fields: Any) -> tuple[EarlyExitConfig, list[Control]]:
    rule = build_policy(EarlyExitConfig(**fields)).resolve(labels, kind)
    return rule, controls_of(rule, EXITS, labels, kind)


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("divergence", SINGLE, ["threshold", "patience"]),
        ("divergence", REGRESSION, ["threshold", "patience"]),
        ("patience", SINGLE, ["patience"]),
        ("patience", MULTI, ["patience"]),
        ("patience", REGRESSION, ["threshold", "patience"]),
        ("entropy", SINGLE, ["threshold"]),
        ("max_prob", MULTI, ["threshold"]),
        ("learned", REGRESSION, ["threshold"]),
        ("confident_patience", SINGLE, ["threshold", "patience"]),
        ("agreement", SINGLE, ["threshold"]),
        ("agreement", REGRESSION, ["threshold"]),
        ("fixed_depth", SINGLE, ["depth"]),
        ("never", SINGLE, []),
    ],
)
def test_a_rule_has_its_own_parameters_and_no_others(name: str, kind: str, fields: list[str]) -> None:
    labels = 1 if kind == REGRESSION else 3
    _, found = opened_controls(kind, labels, **fields_of(name, EXITS, labels, kind))
    assert [control.field for control in found] == fields


def test_the_same_label_or_another_leaves_no_threshold() -> None:
    assert [control.field for control in opened_controls(divergence="label")[1]] == ["patience"]
    assert [control.field for control in opened_controls(MULTI, divergence="label")[1]] == ["threshold", "patience"]


def test_thresholds_of_each_exit_stay_as_they_are() -> None:
    rule, found = opened_controls(policy="confident_patience", threshold=[0.5, 0.25, 0.1, 0.2, 0.0], patience=2)
    assert [control.field for control in found] == ["patience"]
    assert apply(rule, found, [1]) == EarlyExitConfig.of(rule, patience=1)


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("name", NAMES)
def test_spelling_out_changes_no_exit(name: str, kind: str) -> None:
    """What an open field stands for, and sliders that nobody has touched, stop rows where the rule does."""
    labels = 1 if kind == REGRESSION else 4
    logits = np.random.default_rng(0).normal(size=(40, len(EXITS), labels), scale=0.7).cumsum(axis=1)
    doubts = np.random.default_rng(1).random((40, len(EXITS)))
    for divergence in DIVERGENCES if name == "divergence" else ("ce",):
        fields = {**fields_of(name, EXITS, labels, kind), "divergence": divergence}
        rule, found = opened_controls(kind, labels, **fields)
        untouched = apply(rule, found, [control.value for control in found])
        rounded = apply(rule, found, [round(control.value / control.step) * control.step for control in found])
        assert untouched == rounded == rule
        for control in found:
            assert control.low <= control.value <= control.high and control.low < control.high
        if kind == REGRESSION and name in NO_REGRESSION:
            continue
        want = build_policy(**fields).replay(logits, EXITS, kind, doubts).tolist()
        assert build_policy(rule).replay(logits, EXITS, kind, doubts).tolist() == want


def test_ranges() -> None:
    _, (tau, t) = opened_controls(labels=2)
    assert tau.value == pytest.approx(0.3 * math.log(2)) and tau.high == pytest.approx(2 * math.log(2), rel=0.01)
    assert (t.value, t.low, t.high, t.step) == (1, 1, 4, 1)
    _, (tau, _) = opened_controls(labels=2, threshold=7.0)
    assert tau.high >= 8.75
    _, (depth,) = opened_controls(policy="fixed_depth", depth=3)
    assert depth.choices == tuple(EXITS) and depth.value == 3


def test_applied_values() -> None:
    rule, found = opened_controls(threshold=0.2071, patience=2)
    assert apply(rule, found, [0.5, 3.0]) == EarlyExitConfig.of(rule, threshold=0.5, patience=3)
    assert found[0].step == 0.01 and apply(rule, found, [0.21, 2]).threshold == 0.2071  # as far as the slider can say
    for wrong in ([None, 1], ["", 1], [0.1, None], ["x", 1], [0.1, 0]):
        with pytest.raises(ValueError):
            apply(rule, found, wrong)
