"""`ExitPromise`: what a calibration says about rows that nobody has labeled: where they stop, and how often early
exits answer as full depth does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import beta

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.utils.problem import differs, problem_of

Array = np.ndarray


@dataclass(frozen=True)
class ExitPromise:
    """How many rows stop at each exit under one setting, and get another answer than full depth's (None for
    regression). Of token classification a row is a text, which stops with its last token, and its answer is that of
    all of them."""

    exit_layers: tuple[int, ...]
    rows_stopped: tuple[int, ...]
    disagreements: int | None

    @classmethod
    def of(cls, exit_logits: ExitLogits, config: EarlyExitConfig) -> ExitPromise:
        """By replay."""
        found = build_policy(config).replay_history(exit_logits.history())
        units, disagreements = exit_logits.units, None
        if problem_of(exit_logits.kind).gives_labels:
            changed = differs(exit_logits.predicted(found), exit_logits.predictions[-1])
            disagreements = int(units.largest(changed).sum())
        left = units.largest(found)
        counts = tuple(int((left == m).sum()) for m in exit_logits.exits)
        return cls(tuple(exit_logits.exits), counts, disagreements)

    @property
    def rows(self) -> int:
        """Of the calibration."""
        return sum(self.rows_stopped)

    @property
    def agreement(self) -> float | None:
        """Share of the rows that get full depth's answer."""
        return None if self.disagreements is None else (self.rows - self.disagreements) / self.rows

    @cached_property
    def bounds(self) -> tuple[float | None, Array, Array]:
        """What the shares of new rows of the same kind lie below with a probability of 99%, all of them together, as
        far as the calibration's rows can tell: that of disagreements, and [E-1] those of rows that have stopped by an
        exit and of rows that have not. Source: Clopper and Pearson, "The Use of Confidence or Fiducial Limits", 1934.
        """
        stopped = np.cumsum(self.rows_stopped)[:-1]
        level = 1 - 0.01 / (2 * len(stopped) + 1)
        most = None if self.disagreements is None else float(_upper(np.array(self.disagreements), self.rows, level))
        return most, _upper(stopped, self.rows, level), _upper(self.rows - stopped, self.rows, level)


def _upper(successes: Array, rows: int, level: float) -> Array:
    """The upper Clopper-Pearson limit of a share."""
    limit = beta.ppf(level, successes + 1, np.maximum(rows - successes, 1e-9))
    return np.where(successes >= rows, 1.0, limit)
