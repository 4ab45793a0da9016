"""Rules that do not look at the answers: a fixed depth, and full depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, ExitPolicy


class FixedDepthPolicy(ExitPolicy):
    """Every row stops at block `depth`: the line that any dynamic policy has to beat. `decide_every` has no meaning
    here, as there is nothing to decide."""

    name = "fixed_depth"

    def is_final(self, exits: Sequence[int], j: int) -> bool:
        """At `depth`, unless `min_exit` lies behind it."""
        low = self.config.min_exit
        at_depth = exits[j] == self.config.depth and (low is None or exits[j] >= low)
        return at_depth or super().is_final(exits, j)

    def can_exit(self, exits: Sequence[int], j: int) -> bool:
        """Where all rows stop."""
        return self.is_final(exits, j)

    def should_exit(self, history: ExitHistory, j: int) -> Array:
        """[n] bool."""
        return np.full(history.rows, history.exits[j] == self.config.depth)

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """`depth` must be a block with an exit."""
        super().check(exits, num_labels, problem_type)
        if self.config.depth not in exits:
            raise ValueError(f"depth={self.config.depth} is not allowed: the model has exits at blocks {list(exits)}.")


class NeverPolicy(ExitPolicy):
    """No row stops before the last exit (or `max_exit`)."""

    name = "never"

    def can_exit(self, exits: Sequence[int], j: int) -> bool:
        """Where all rows stop."""
        return self.is_final(exits, j)

    def should_exit(self, history: ExitHistory, j: int) -> Array:
        """[n] bool, all False."""
        return np.zeros(history.rows, dtype=bool)
