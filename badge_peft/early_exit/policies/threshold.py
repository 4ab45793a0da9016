"""`ThresholdPolicy`: policies that compare one number per exit and row, the score, with a threshold."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.divergences import max_entropy
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, ExitPolicy

#: Fields of a config that may differ among rows of which one score is computed.
_OF_EACH_ROW = frozenset({"threshold", "calibration", "min_exit", "max_exit", "decide_every", "exit_layers"})


class ThresholdPolicy(ExitPolicy):
    """A row may stop at an exit when its score there lies on the right side of the threshold.

    Having the score apart from the threshold makes a sweep over thresholds one pass over the exits.
    """

    #: Whether a row stops where the score is *at least* the threshold (a confidence), not *below* it (an uncertainty).
    stops_above: bool = False
    #: Whether the score asks how many labels there are, and not only what the exits say of each.
    counts_labels: ClassVar[bool] = True

    @property
    def decides_alone(self) -> bool:
        """Whether a decision at an exit depends on no other exit's threshold."""
        return True

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n] float32: how sure (or unsure) exit j (index) is of each row, from the exits up to j."""
        raise NotImplementedError  # by each policy

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """The threshold that `threshold=None` stands for, in the unit of the score."""
        raise NotImplementedError  # by each policy

    def should_exit(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: the score is on the right side of the threshold."""
        if isinstance(self.config.threshold, list):
            return self.should_exit_each(history, j)
        return self.compare(self.score(history, j), self.threshold(history.num_labels, history.problem_type))

    def should_exit_each(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: as `should_exit`, where each exit has its own threshold."""
        return self.compare(self.score(history, j), self.threshold(history.num_labels, history.problem_type, j))

    def compare(self, score: Array, threshold: float) -> Array:
        """[n] bool: which scores [n] lie on the right side of the threshold."""
        tau = np.float32(threshold)
        return score >= tau if self.stops_above else score < tau

    def batching_key(self, num_labels: int) -> Hashable | None:
        """All that the score may read; with scores that count labels, K too. None where each exit has a threshold."""
        own = type(self)
        decides_by_score = own.should_exit is ThresholdPolicy.should_exit and own.stops is ExitPolicy.stops
        if self.reads_uncertainty or not decides_by_score or own.compare is not ThresholdPolicy.compare:
            return None
        config = self.config
        if isinstance(config.threshold, list):
            return None
        rest = ((k, v) for k, v in vars(config).items() if k not in _OF_EACH_ROW)
        read = tuple((k, id(v) if isinstance(v, dict) else repr(v)) for k, v in rest)
        return own, read, num_labels if self.counts_labels else None

    def never_exits(self, history: ExitHistory) -> Array:
        """[n]: the score of an exit at which no row may stop."""
        return np.full(history.rows, -np.inf if self.stops_above else np.inf, dtype=np.float32)

    # -------------------------------------------------------------------------------------------------- the threshold

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses thresholds that are not one per exit, too."""
        super().check(exits, num_labels, problem_type)
        taus = self.config.threshold
        if isinstance(taus, list) and len(taus) != len(exits):
            raise ValueError(
                f"threshold has {len(taus)} numbers, but there are {len(exits)} exits, at blocks {list(exits)}: give "
                "one for each, or a single number for all."
            )

    def uses_threshold(self, problem_type: str) -> bool:
        return True

    def threshold(self, num_labels: int, problem_type: str, j: int = 0) -> float:
        """The config's at exit j (index), or the default."""
        given = self.config.threshold
        if given is None or not self.uses_threshold(problem_type):
            return self.default_threshold(num_labels, problem_type)
        return given[j] if isinstance(given, list) else given

    def _tau(self, history: ExitHistory, j: int) -> np.float32:
        return np.float32(self.threshold(history.num_labels, history.problem_type, j))

    def _all_below(self, history: ExitHistory, values: Sequence[Array], j: int) -> Array:
        """[n] bool: whether each of the `values` [n] of exits in a row, exit j the first and from there upwards, lies
        below the threshold of its own exit."""
        return np.logical_and.reduce([x < self._tau(history, j - k) for k, x in enumerate(values)])

    def in_nats(self, problem_type: str) -> bool:
        """Whether the score grows with ln K."""
        return False

    def largest_score(self, num_labels: int, problem_type: str, widest: float | None) -> float | None:
        """A threshold beyond which moving on changes little or nothing, `widest` as for `threshold_range`; None where
        there is nothing to choose."""
        return max_entropy(num_labels, problem_type) if self.in_nats(problem_type) else 1.0

    def threshold_range(
        self, num_labels: int, problem_type: str, widest: float | None = None
    ) -> tuple[float, float] | None:
        """From 0 to the largest score."""
        largest = self.largest_score(num_labels, problem_type, widest)
        if largest is None or not self.uses_threshold(problem_type):
            return None
        return 0.0, largest

    def resolve(self, num_labels: int, problem_type: str) -> EarlyExitConfig:
        """With the threshold, where there is one to choose."""
        config = super().resolve(num_labels, problem_type)
        if config.threshold is not None or self.threshold_range(num_labels, problem_type) is None:
            return config
        return replace(config, threshold=self.default_threshold(num_labels, problem_type))

    def grid(self, exits: Sequence[int], problem_type: str) -> list[EarlyExitConfig] | None:
        """Thresholds, where none is given."""
        open_ = self.uses_threshold(problem_type) and self.config.threshold is None
        return None if open_ else super().grid(exits, problem_type)

    def score_nodes(self, at: Any) -> Any:
        """[n]: `score` as nodes."""
        raise NotImplementedError  # by those that can be exported

    def nodes(self, at: Any) -> Any:
        """The comparison, on `score_nodes`."""
        return at.op("GreaterOrEqual" if self.stops_above else "Less", self.score_nodes(at), at.threshold)
