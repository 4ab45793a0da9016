"""Ranking: the candidates of a query leave as soon as they cannot reach its top k. Beyond the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig, register_policy
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, short
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.utils.checks import is_number
from badge_peft.utils.problem import Problem

#: Factors on the margins that a sweep tries, slow to fast.
FACTORS = (4.0, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0)


@register_policy
class TopKPolicy(ThresholdPolicy):
    """A candidate stops at exit m when its score there lies more than margin_m below the k-th best score of exit m
    among the candidates of its query that have not left.

    Rows of one query are a group: the `groups` of `early_exit_forward` and of `replay`; without them all rows are one
    query. So at least k candidates of a query always stay, and equal scores are treated alike. A score that is NaN or
    infinite neither stops nor counts for the k-th best. Where a query has at most k candidates, none stops.

    `parameters={"margins": [...]}` has one margin per exit, in units of the score, as `calibrate_ranking` writes them;
    None is a margin without end, and such an exit is not computed; that of the last exit is not read. `threshold` is a
    factor on all of them: 1 by default, 0 keeps no more than k and ties. `top_k` is k: 10 by default.

    Kin: the Cascade Transformer (Soldaini and Moschitti, ACL 2020), which drops a fixed share at each exit.
    """

    name = "top_k"
    stops_above = True
    by_group = True

    @property
    def decides_alone(self) -> bool:
        """Whether the k-th best is reached depends on who has left before."""
        return False

    @property
    def group_size(self) -> int:
        """k: how many candidates of a query count."""
        return self.config.resolved_top_k

    def can_exit(self, exits: Sequence[int], j: int) -> bool:
        """Not at an exit whose margin has no end, either."""
        margins = (self.config.parameters or {}).get("margins")
        if margins is not None and len(margins) == len(exits) and np.isinf(self.limit(j, 1.0)):
            return self.is_final(exits, j)
        return super().can_exit(exits, j)

    def may_stop(self, history: ExitHistory) -> bool:
        """Not where every query has at most k candidates."""
        sizes = [history.rows] if history.groups is None else np.bincount(history.groups)
        return bool(np.max(sizes, initial=0) > self.group_size)

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: how far each candidate lies below the k-th best of its query, in units of the score; -inf where there
        is no k-th best."""
        found = history.logits[j][:, 0]
        counted = found if history.finite is None else np.where(history.finite[j], found, np.float32(-np.inf))
        return kth_best(counted, history.groups, self.group_size) - found

    def should_exit(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: more than the margin below."""
        return self.score(history, j) > self.limit(j, self.threshold(1, history.problem_type, j))

    def limit(self, j: int, factor: float) -> np.float32:
        """margin_m of exit j (index), times a factor."""
        margin = (self.config.parameters or {})["margins"][j]
        if margin is None or np.isinf(margin):
            return np.float32(np.inf)
        return np.float32(margin) * np.float32(factor)

    def replay_history(self, history: ExitHistory) -> Array:
        """[N]: exit by exit, as the k-th best is that of the candidates which are left."""
        self.check(history.exits, history.num_labels, history.problem_type)
        answer = np.full(history.rows, -1, dtype=np.int64)
        for j, block in enumerate(history.exits):
            left = answer < 0
            if not left.any():
                break
            answer[np.flatnonzero(left)[self.stops(history.of_rows(left), j)]] = block
        return answer

    def lookback(self) -> int:
        """No exit."""
        return 0

    # ---------------------------------------------------------------------------------------------------- its config

    @classmethod
    def suits(cls, problem_type: str) -> bool:
        """Classes have no order."""
        return problem_type != Problem.name

    @classmethod
    def check_config(cls, config: EarlyExitConfig) -> None:
        """Refuses margins and a factor with which fewer than k would stay."""
        taus = config.threshold if isinstance(config.threshold, list) else [config.threshold]
        if any(tau is not None and tau < 0 for tau in taus):
            raise ValueError(
                f"threshold={config.threshold} is not allowed: with policy='top_k' it is a factor on the margins, 0 "
                "or more."
            )
        if config.parameters is None:
            return  # refused when it meets a model
        margins = config.parameters.get("margins")
        if not isinstance(margins, (list, tuple)) or not all(map(_is_margin, margins)):
            raise ValueError(
                f"parameters={config.parameters!r} is not allowed: policy='top_k' needs 'margins', a list of numbers "
                "that are 0 or more, or None, one for each exit. calibrate_ranking finds them."
            )

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses models with more than one output, and margins that are missing or not one per exit."""
        super().check(exits, num_labels, problem_type)
        if num_labels != 1:
            raise ValueError(
                "policy='top_k' ranks by one score, and the model has "
                f"{num_labels} outputs: load it with num_labels=1."
            )
        if self.config.parameters is None:
            raise ValueError(
                "policy='top_k' has no margins: find them with "
                "badge_peft.ranking.calibrate_ranking(exit_scores, query_ids, top_k=...) and pass on the config that "
                "it returns."
            )
        margins = self.config.parameters["margins"]
        if len(margins) != len(exits):
            raise ValueError(f"parameters has {len(margins)} margins, but there are {len(exits)} exits.")

    @classmethod
    def fitted_numbers(cls, config: EarlyExitConfig) -> str:
        """The margins of all exits but the last, which is never left."""
        margins = (config.parameters or {}).get("margins", [])[:-1]
        return f"margins=[{', '.join('None' if x is None else short(float(x)) for x in margins)}]" if margins else ""

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 1.0

    def largest_score(self, num_labels: int, problem_type: str, widest: float | None) -> float:
        return FACTORS[0]

    def nodes(self, at: Any) -> Any:
        """The comparison with the k-th best of all rows; k comes with the call. Rows that have left must not be there
        any more."""
        if np.isinf(self.limit(at.index, 1.0)):
            return None
        scores = at.op("Squeeze", at.logits, at.ints([1]))  # [n]
        # 0 times NaN or infinity is NaN, which equals nothing
        finite = at.op("Equal", at.op("Mul", scores, at.floats(0)), at.floats(0))
        counted = at.op("Where", finite, scores, at.floats(-np.inf))
        rows, k = at.op("Shape", scores), at.op("Unsqueeze", at.patience, at.ints([0]))  # [1]
        best = at.op("TopK", counted, at.op("Min", rows, k), outputs=2, axis=0)
        kth = at.op("ReduceMin", best, at.ints([0]), keepdims=0)
        limit = at.op("Mul", at.floats(self.limit(at.index, 1.0)), at.threshold)
        return at.op("And", at.op("Greater", at.op("Sub", kth, scores), limit), at.op("GreaterOrEqual", rows, k))

    @classmethod
    def templates(cls, problem_type: str) -> list[EarlyExitConfig]:
        """None: margins belong to a query, so `calibrate_ranking` finds them."""
        return []

    def grid(self, exits: Sequence[int], problem_type: str) -> list[EarlyExitConfig]:
        """Factors, where none is given."""
        if self.config.threshold is not None:
            return [self.config]
        return [replace(self.config, threshold=factor) for factor in FACTORS]


def _is_margin(value: object) -> bool:
    return value is None or value == float("inf") or (is_number(value) and cast(float, value) >= 0)


def kth_best(scores: Array, groups: Array | None, k: int) -> Array:
    """[n]: for each row the k-th largest score of its group; -inf where the group has fewer than k rows.

    Args:
        scores: [n]; -inf counts as no score.
        groups: [n], as `group_codes` gives them.
        k: 1 or more.
    """
    n = len(scores)
    if groups is None:
        best = np.partition(scores, n - k)[n - k] if k <= n else -np.inf
        return np.full(n, best, dtype=scores.dtype)
    order = np.lexsort((-scores, groups))  # group by group, the best first
    counts = np.bincount(groups)
    place = np.cumsum(counts) - counts + k - 1  # of the k-th best of each group
    enough = counts >= k
    bars = np.full(len(counts), -np.inf, dtype=scores.dtype)
    bars[enough] = scores[order[place[enough]]]
    return bars[groups]
