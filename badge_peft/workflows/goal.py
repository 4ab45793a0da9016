"""`Settings`, the base of what can be asked of a workflow; how a policy is chosen, and which one answers in place of
an adapter's own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from badge_peft.utils.checks import check_int, check_number

GOALS = ("max_score_drop", "target_blocks_saved", "target_time_saved")
# a name has the same range wherever it stands
_AT_LEAST = {
    0: ("depth", "latency", "seed", "trials"),
    1: ("batch_size", "candidates", "epochs", "max_eval", "max_rows", "max_train", "patience", "r", "top_k"),
    4: ("max_length",),
}
_RANGES = (
    (("adapter_lr", "backbone_lr", "learning_rate"), lambda x: x > 0, "it must be a number above 0"),
    (("confidence", "eval_share"), lambda x: 0 < x < 1, "it must lie between 0 and 1"),
    (("keep",), lambda x: 0 < x <= 1, "it is a share of the queries, in (0, 1]"),
    (("distillation",), lambda x: 0 <= x <= 1, "it is a fraction, in [0, 1]"),
    (("max_score_drop",), lambda x: x >= 0, "it must be 0 or more"),
    (("target_blocks_saved", "target_time_saved"), lambda x: 0 <= x < 1, "it is a share, in [0, 1)"),
)


class Settings:
    """Base of the groups of fields. A number has the same range wherever its name stands."""

    def __post_init__(self) -> None:
        for least, names in _AT_LEAST.items():
            for name in names:
                check_int(name, getattr(self, name, None), at_least=least)
        for names, allowed, rule in _RANGES:
            for name in names:
                check_number(name, getattr(self, name, None), allowed, rule)


@dataclass(frozen=True, kw_only=True)
class Goal(Settings):
    """What `calibrate` is asked for.

    Args:
        policy: Policy to calibrate: auto (search them all), divergence, patience, entropy, max_prob, learned,
            confident_patience, agreement, fixed_depth, or never (full depth).
        max_score_drop: The most that exiting early may cost, in units of the score: 0.01 is a point of accuracy. The
            fastest setting within it is taken. Default: 0.01.
        target_blocks_saved: In place of a largest drop: the share of blocks to save, 0.5 for half. The best score at
            it is taken.
        target_time_saved: In place of a largest drop: the share of the time to save, as it was measured on the machine
            that trained the adapter.
        target_speedup: The old name of target_blocks_saved.
        confidence: Such as 0.95: choose so that with this probability the drop holds on new data of the same kind,
            too. Takes more rows.
        top_k: For ranking: how many candidates of a query count. Default: those of the adapter's own rule, of a new
            one 10.
        keep: For ranking, in the place of a largest drop: share of the queries whose top k is to be full depth's.
            Default: 0.95.
        per_exit: Also try a threshold, and for max_prob a temperature, for each exit; they are taken where they are
            better on rows that did not choose them.
    """

    policy: str = "auto"
    max_score_drop: float | None = None
    target_blocks_saved: float | None = None
    target_time_saved: float | None = None
    target_speedup: float | None = None

    def __post_init__(self) -> None:
        if self.target_speedup is not None:
            warnings.warn(
                "target_speedup is the share of blocks to save: say target_blocks_saved. The old name goes after 0.1.",
                FutureWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "target_blocks_saved", self.target_speedup)
            object.__setattr__(self, "target_speedup", None)
        super().__post_init__()

    confidence: float | None = None
    top_k: int | None = None
    keep: float | None = None
    per_exit: bool = False

    def arguments(self) -> dict[str, Any]:
        """What `calibrate` takes besides the policy; without a goal, a drop of 0.01."""
        if self.top_k is not None or self.keep is not None:
            raise ValueError("top_k and keep are for ranking: name the task with --task ranking when you train.")
        goals = {name: getattr(self, name) for name in GOALS}
        given = [name for name, value in goals.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are several goals: give exactly one of them.")
        goal = {**goals, "confidence": self.confidence}
        if not given:
            goal["max_score_drop"] = 0.01
        return {**goal, "per_exit": self.per_exit}

    def ranking_arguments(self) -> dict[str, Any]:
        """What `calibrate_ranking` takes."""
        if self.policy not in ("auto", "top_k"):
            raise ValueError(f"policy={self.policy!r} is not allowed for ranking: it is 'top_k'.")
        given = next((name for name in GOALS if getattr(self, name) is not None), None)
        if given is not None:
            raise ValueError(f"{given} is not for ranking: say with keep what may be lost.")
        if self.per_exit:
            raise ValueError("per_exit is not for ranking: leave it out, its margins are one for each exit already.")
        keep = 0.95 if self.keep is None else self.keep
        return {"top_k": 10 if self.top_k is None else self.top_k, "keep": keep, "confidence": self.confidence}


@dataclass(frozen=True, kw_only=True)
class PolicyOverrides(Settings):
    """Another policy than the adapter's own, or other values for its fields.

    Args:
        policy: Policy in place of the adapter's own: divergence, patience, entropy, max_prob, learned,
            confident_patience, agreement, fixed_depth, or never (full depth).
        threshold: Threshold of the policy, in place of the adapter's.
        patience: How many exits must agree, in place of the adapter's.
        depth: The block that answers, for the policy fixed_depth.
    """

    policy: str | None = None
    threshold: float | None = None
    patience: int | None = None
    depth: int | None = None
