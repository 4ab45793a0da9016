"""The parameters that a rule has, as sliders: what may be moved, how far, and the rule that the sliders describe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy


@dataclass(frozen=True)
class Control:
    """One parameter of a rule."""

    field: str  # of `EarlyExitConfig`
    label: str
    value: float  # at the start
    low: float
    high: float
    step: float = 1.0
    choices: tuple[int, ...] | None = None  # None: a range


def controls_of(
    rule: EarlyExitConfig, exits: Sequence[int], num_labels: int, problem_type: str, widest: float | None = None
) -> list[Control]:
    """What can be moved."""
    policy = build_policy(rule)
    if policy.takes_depth:
        assert rule.depth is not None
        return [Control("depth", "the block that answers", rule.depth, exits[0], exits[-1], choices=tuple(exits))]
    found = []
    between = policy.threshold_range(num_labels, problem_type, widest)
    if between is not None and isinstance(rule.threshold, float):  # one for each exit stays as it is
        high = max(between[1], 1.25 * rule.threshold)
        step = 10.0 ** math.floor(math.log10(high / 200))
        high = round(math.ceil(high / step) * step, 10)
        found.append(
            Control("threshold", "tau, the threshold", rule.threshold, min(between[0], rule.threshold), high, step)
        )
    if policy.counts_exits:
        most = max(2, len(exits) - 1, policy.patience)
        found.append(Control("patience", "t, how many must agree", policy.patience, 1, most))
    return found


def apply(rule: EarlyExitConfig, controls: Sequence[Control], values: Sequence[Any]) -> EarlyExitConfig:
    """`rule` with the controls at `values`. Within half a step of the rule's own value it is that value: a slider only
    knows steps."""
    changes: dict[str, Any] = {}
    for control, value in zip(controls, values, strict=True):
        if value is None or value == "":
            raise ValueError(f"{control.label} has no value: give a number.")
        number = float(value)
        if abs(number - control.value) <= control.step / 2:
            number = control.value
        changes[control.field] = number if control.field == "threshold" else round(number)
    return EarlyExitConfig.of(rule, **changes)
