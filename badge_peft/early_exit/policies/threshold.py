"""`ThresholdPolicy`: rules that compare one number per exit and row, the score, with a threshold."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, ExitPolicy, max_entropy


class ThresholdPolicy(ExitPolicy):
    """A row may stop at an exit when its score there lies on the right side of the threshold.

    Having the score apart from the threshold makes a sweep over thresholds one pass over the exits.
    """

    #: Whether a row stops where the score is *at least* the threshold (a confidence), not *below* it (an uncertainty).
    stops_above: ClassVar[bool] = False

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n] float32: how sure (or unsure) exit j (index) is of each row, from the exits up to j."""
        raise NotImplementedError

    def should_exit(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: the score is on the right side of the threshold."""
        tau = np.float32(self.limit(history))
        score = self.score(history, j)
        return score >= tau if self.stops_above else score < tau

    def limit(self, history: ExitHistory) -> float:
        """The threshold in the unit of the score."""
        return self.threshold(history) * self.unit(history)

    def unit(self, history: ExitHistory) -> float:
        """What a threshold of 1 means in the unit of the score: ln K when the config says `normalize`."""
        if self.config.normalize and self.config.threshold is not None and self.in_nats(history.problem_type):
            return max_entropy(history.num_labels, history.problem_type)
        return 1.0

    def in_nats(self, problem_type: str) -> bool:
        """Whether the score grows with ln K."""
        return False

    def never_exits(self, history: ExitHistory) -> Array:
        """[n]: the score of an exit that may stop no row."""
        return np.full(history.rows, -np.inf if self.stops_above else np.inf, dtype=np.float32)
