"""Score against blocks saved: what each policy costs and gives on stored exit logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import POLICIES, build_policy
from badge_peft.early_exit.policies.base import describe, policy_label, set_fields
from badge_peft.evaluation.candidates import families, fitted, fixed_depths, settings, templates_of
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric, metric_name, scorer
from badge_peft.evaluation.per_exit import per_exit as settings_per_exit
from badge_peft.utils.checks import check_int
from badge_peft.utils.files import write_json


@dataclass(frozen=True)
class TradeOffPoint:
    """One configuration on one data set.

    Args:
        name: The curve that it belongs to.
        config: The configuration.
        mean_exit: Mean number of the block that answered; of token classification, at which the text left.
        blocks_saved: 1 - mean_exit / M, the share of blocks saved.
        score: Of the answers.
    """

    name: str
    config: EarlyExitConfig
    mean_exit: float
    blocks_saved: float
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Flat: the numbers, and the fields of the config that are set."""
        numbers = {"mean_exit": self.mean_exit, "blocks_saved": self.blocks_saved, "score": self.score}
        form = {"divergence": self.config.divergence, "window": self.config.window}
        return {"name": self.name, **form, **set_fields(self.config), **numbers}


@dataclass
class TradeOff:
    """The points of a sweep; the line of fixed depths is always among them.

    Args:
        points: In the order of the sweep.
        metric: What `score` is.
        num_blocks: M.
    """

    points: list[TradeOffPoint]
    metric: str
    num_blocks: int

    @property
    def names(self) -> list[str]:
        """Names of the curves."""
        return list(dict.fromkeys(point.name for point in self.points))

    def curve(self, name: str) -> list[TradeOffPoint]:
        """The points of one curve, by blocks saved."""
        return sorted((p for p in self.points if p.name == name), key=lambda p: p.blocks_saved)

    def best_at(self, name: str, speedup: float) -> TradeOffPoint | None:
        """The best score of a curve where at least the share `speedup` of the blocks is saved; None where none is."""
        reached = [p for p in self.curve(name) if p.blocks_saved >= speedup - 1e-12]
        return max(reached, key=lambda p: (p.score, p.blocks_saved), default=None)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict per point, for `pandas.DataFrame` or JSON."""
        return [point.to_dict() for point in self.points]

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, whole or not at all."""
        write_json(path, {"metric": self.metric, "num_blocks": self.num_blocks, "points": self.to_dicts()})


def evaluate_policy(
    exit_logits: ExitLogits,
    config: EarlyExitConfig | dict[str, Any],
    metric: Metric = "accuracy",
    name: str | None = None,
) -> TradeOffPoint:
    """Speed-up and score of one configuration, by replay."""
    config = EarlyExitConfig.of(config)
    stops = build_policy(config).replay_history(exit_logits.history())
    return _point(exit_logits, config, stops, metric, name or policy_label(config))


def sweep(
    exit_logits: ExitLogits,
    policies: Iterable[str | dict[str, Any] | EarlyExitConfig] | None = None,
    points: int = 20,
    metric: Metric = "accuracy",
) -> TradeOff:
    """The trade-off of several policies, by replaying stored logits.

    Args:
        exit_logits: With labels.
        policies: Names, or configs whose threshold (or depth, or patience) is left open. None: `divergence`,
            `patience`, `entropy` and `max_prob`, those that suit the problem type. A name takes the policy's default
            patience.
        points: Per policy, at least 1, spread over the speed-ups it can give. `patience` and `fixed_depth` have one
            point per block and no more.
        metric: As for `exit_scores`.

    Returns:
        The points, with the fixed depths first. Where several of the `policies` are variants of one, their curves are
        named by what they set: `entropy, min_exit=3`.
    """
    check_int("points", points, at_least=1, optional=False)
    if policies is None:
        policies = default_policies(exit_logits.kind)
    asked = [EarlyExitConfig.of({"policy": p} if isinstance(p, str) else p) for p in policies if p != "fixed_depth"]
    found = curve_points(exit_logits, [fixed_depths(EarlyExitConfig(), exit_logits)], points, metric)
    names = [policy_label(config) for config in asked]
    for config, name in zip(asked, names, strict=True):
        curve = curve_points(exit_logits, [fitted(config, exit_logits)], points, metric)
        if names.count(name) > 1:
            name = describe(replace(config, threshold=None))
        found += [replace(point, name=name) for point in curve]
    return TradeOff(found, metric_name(metric), exit_logits.depth)


def search(
    exit_logits: ExitLogits,
    policy: str | dict[str, Any] | EarlyExitConfig,
    count: int,
    metric: Metric,
    per_exit: bool = False,
) -> list[TradeOffPoint]:
    """Every setting of every variant of `policy` that a calibration considers, and the fixed depths between the
    `min_exit` and `max_exit` that it asks for; with `per_exit` also settings that differ from exit to exit."""
    depths = fixed_depths(templates_of(policy, exit_logits)[0], exit_logits)
    points = curve_points(exit_logits, [depths, *families(policy, exit_logits, per_exit)], count, metric)
    if per_exit:
        more = settings_per_exit([point.config for point in pareto(points)], exit_logits)
        points += [evaluate_policy(exit_logits, config, metric) for config in more]
    return points


def pareto(points: list[TradeOffPoint]) -> list[TradeOffPoint]:
    """The points that no other beats in both score and blocks saved, from slow to fast."""
    front: list[TradeOffPoint] = []
    for point in sorted(points, key=lambda p: (-p.blocks_saved, -p.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front[::-1]


def default_policies(problem_type: str) -> list[str]:
    """The policies that a sweep compares where none are named."""
    return [name for name, policy in POLICIES.items() if policy.in_default_sweep and policy.suits(problem_type)]


def curve_points(
    exit_logits: ExitLogits, families: Iterable[EarlyExitConfig], count: int, metric: Metric
) -> list[TradeOffPoint]:
    """The settings of each family, at most `count` of one."""
    history, units = exit_logits.history(), exit_logits.units
    return [
        _point(exit_logits, config, stops, metric, policy_label(family))
        for family in families
        for config, stops in settings(family, history, count, units)
    ]


def _point(
    exit_logits: ExitLogits, config: EarlyExitConfig, stops: np.ndarray, metric: Metric, name: str
) -> TradeOffPoint:
    mean_exit = float(exit_logits.units.largest(stops).mean())
    found = scorer(exit_logits, metric)(exit_logits.predicted(stops))
    return TradeOffPoint(name, config, mean_exit, 1 - mean_exit / exit_logits.depth, found)
