"""How a policy is chosen, and which one answers in place of an adapter's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from badge_peft.workflows.ranges import Settings


@dataclass(frozen=True, kw_only=True)
class Goal(Settings):
    """What `calibrate` is asked for.

    Args:
        policy: Policy to calibrate: auto (search them all), divergence, patience, entropy, max_prob, learned,
            confident_patience, agreement, fixed_depth, or never (full depth).
        max_score_drop: The most that exiting early may cost, in units of the score: 0.01 is a point of accuracy. The
            fastest setting within it is taken. Default: 0.01.
        target_speedup: In place of a largest drop: the fraction of blocks to save, 0.5 for half. The best score at it
            is taken.
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
    target_speedup: float | None = None
    confidence: float | None = None
    top_k: int | None = None
    keep: float | None = None
    per_exit: bool = False

    def arguments(self) -> dict[str, Any]:
        """What `calibrate` takes besides the policy; without a goal, a drop of 0.01.

        Raises:
            ValueError: there are two goals, or those of ranking.
        """
        if self.top_k is not None or self.keep is not None:
            raise ValueError("top_k and keep are for ranking: name the task with --task ranking when you train.")
        drop, speedup = self.max_score_drop, self.target_speedup
        if drop is not None and speedup is not None:
            raise ValueError("max_score_drop and target_speedup are two goals: give exactly one of them.")
        drop = 0.01 if drop is None and speedup is None else drop
        goal = {"max_score_drop": drop, "target_speedup": speedup, "confidence": self.confidence}
        return {**goal, "per_exit": self.per_exit}

    def ranking_arguments(self) -> dict[str, Any]:
        """What `calibrate_ranking` takes.

        Raises:
            ValueError: another policy than `top_k`, or a goal of classification.
        """
        if self.policy not in ("auto", "top_k"):
            raise ValueError(f"policy={self.policy!r} is not allowed for ranking: it is 'top_k'.")
        if self.max_score_drop is not None or self.target_speedup is not None:
            raise ValueError("max_score_drop and target_speedup are not for ranking: say with keep what may be lost.")
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
