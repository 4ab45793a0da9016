"""The parameters that a rule has, as sliders: what may be moved, how far, and the rule that the sliders describe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy


@dataclass(frozen=True)
class Knob:
    """One parameter of a rule.

    Args:
        field: Of `EarlyExitConfig`.
        label: What it is called.
        value: Where the rule at the start has it.
        low: Smallest value.
        high: Largest value.
        step: Between two values.
        choices: The values, where they are not a range.
    """

    field: str
    label: str
    value: float
    low: float = 0.0
    high: float = 1.0
    step: float = 1.0
    choices: tuple[int, ...] | None = None


def knobs(
    rule: EarlyExitConfig, exits: Sequence[int], num_labels: int, problem_type: str, widest: float | None = None
) -> list[Knob]:
    """What can be moved.

    Args:
        rule: With its open fields filled in, by `ExitPolicy.resolve`.
        exits: Block numbers of the model's exits.
        num_labels: K.
        problem_type: As transformers has it.
        widest: The largest distance between two exits' values that was seen, for regression; None where nobody knows.
    """
    policy = build_policy(rule)
    if policy.takes_depth:
        assert rule.depth is not None
        return [Knob("depth", "the block that answers", rule.depth, exits[0], exits[-1], choices=tuple(exits))]
    found = []
    between = policy.threshold_range(num_labels, problem_type, widest)
    if between is not None and rule.threshold is not None:
        high = max(between[1], 1.25 * rule.threshold)
        step = 10.0 ** math.floor(math.log10(high / 200))
        low = min(between[0], rule.threshold)
        found.append(Knob("threshold", "tau, the threshold", rule.threshold, low, _up(high, step), step))
    if policy.counts_exits:
        most = max(2, len(exits) - 1, policy.patience)
        found.append(Knob("patience", "t, how many must agree", policy.patience, 1, most))
    return found


def turned(rule: EarlyExitConfig, known: Sequence[Knob], values: Sequence[Any]) -> EarlyExitConfig:
    """`rule` with the knobs at `values`. Within half a step of the rule's own value it is that value: a slider only
    knows steps.

    Raises:
        ValueError: a value is not allowed.
    """
    changes: dict[str, Any] = {}
    for knob, value in zip(known, values, strict=True):
        if value is None or value == "":
            raise ValueError(f"{knob.label} has no value: give a number.")
        number = float(value)
        if abs(number - knob.value) <= knob.step / 2:
            number = knob.value
        changes[knob.field] = number if knob.field == "threshold" else round(number)
    return EarlyExitConfig.of(rule, **changes)


def _up(value: float, step: float) -> float:
    return round(math.ceil(value / step) * step, 10)
