"""The parameters that a rule has, as sliders: what may be moved, how far, and the rule that the sliders describe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import (
    AgreementPolicy,
    ConfidentPatiencePolicy,
    DivergencePolicy,
    EntropyPolicy,
    FixedDepthPolicy,
    PatiencePolicy,
    ThresholdPolicy,
    build_policy,
)
from badge_peft.early_exit.policies.base import max_entropy


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


def spelled_out(rule: EarlyExitConfig, num_labels: int, problem_type: str) -> EarlyExitConfig:
    """`rule` with the numbers that its open fields stand for, of those that the policy has."""
    policy = build_policy(rule)
    changes: dict[str, Any] = {}
    if isinstance(policy, ThresholdPolicy):
        history = ExitHistory([1], 0, num_labels, problem_type)
        unit = _with_unit(policy).unit(history)
        if rule.threshold is None and _has_threshold(policy, problem_type):
            changes["threshold"] = policy.limit(history) / unit
    if isinstance(policy, (DivergencePolicy, ConfidentPatiencePolicy)):
        changes["patience"] = policy.patience
    return EarlyExitConfig.of(rule, **changes)


def knobs(
    rule: EarlyExitConfig, exits: Sequence[int], num_labels: int, problem_type: str, widest: float | None = None
) -> list[Knob]:
    """What can be moved.

    Args:
        rule: From `spelled_out`.
        exits: Block numbers of the model's exits.
        num_labels: K.
        problem_type: As transformers has it.
        widest: The largest distance between two exits' values that was seen, for regression; None where nobody knows.
    """
    policy = build_policy(rule)
    if isinstance(policy, FixedDepthPolicy):
        assert rule.depth is not None
        return [Knob("depth", "the block that answers", rule.depth, exits[0], exits[-1], choices=tuple(exits))]
    found = []
    if isinstance(policy, ThresholdPolicy) and _has_threshold(policy, problem_type):
        assert rule.threshold is not None
        unit = _with_unit(policy).unit(ExitHistory([1], 0, num_labels, problem_type))
        high = _largest(policy, num_labels, problem_type, widest) / unit
        high = max(high, 1.25 * rule.threshold)
        step = 10.0 ** math.floor(math.log10(high / 200))
        found.append(
            Knob("threshold", "tau, the threshold", rule.threshold, min(0.0, rule.threshold), _up(high, step), step)
        )
    if rule.patience is not None and isinstance(policy, (DivergencePolicy, ConfidentPatiencePolicy)):
        most = max(2, len(exits) - 1, rule.patience)
        found.append(Knob("patience", "t, how many must agree", rule.patience, 1, most))
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


def _has_threshold(policy: ThresholdPolicy, problem_type: str) -> bool:
    """Not where the same label or another is all there is."""
    if problem_type == "regression":
        return True
    if isinstance(policy, PatiencePolicy):
        return False
    by_label = isinstance(policy, DivergencePolicy) and policy.config.divergence == "label"
    return not by_label or problem_type == "multi_label_classification"


def _with_unit(policy: ThresholdPolicy) -> ThresholdPolicy:
    """The policy with a threshold of its own, which is what gives `normalize` a meaning."""
    return type(policy)(policy.config, threshold=1.0)


def _largest(policy: ThresholdPolicy, num_labels: int, problem_type: str, widest: float | None) -> float:
    """A threshold beyond which moving on changes little or nothing, in the unit of the score."""
    most = max_entropy(num_labels, problem_type)
    if problem_type == "regression" and isinstance(policy, (DivergencePolicy, AgreementPolicy)):
        return widest or 1.0
    if isinstance(policy, DivergencePolicy):
        halves = num_labels if problem_type == "multi_label_classification" else 1
        return {"ce": 2 * most, "kl": most, "js": halves * math.log(2), "label": float(num_labels)}[
            policy.config.divergence
        ]
    return most if isinstance(policy, EntropyPolicy) and policy.in_nats(problem_type) else 1.0


def _up(value: float, step: float) -> float:
    return round(math.ceil(value / step) * step, 10)
