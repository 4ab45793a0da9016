"""Policies that do not look at the answers: a fixed depth, and full depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig, register_policy
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, ExitPolicy


class UnconditionalPolicy(ExitPolicy):
    """All rows stop at one block."""

    @classmethod
    def templates(cls, problem_type: str) -> list[EarlyExitConfig]:
        """None: every search has the fixed depths in addition."""
        return []

    def opened(self, problem_type: str) -> EarlyExitConfig | None:
        """None, for the same reason."""
        return None

    def can_exit(self, exits: Sequence[int], j: int) -> bool:
        """Where all rows stop."""
        return self.is_final(exits, j)

    def should_exit(self, history: ExitHistory, j: int) -> Array:
        """[n] bool."""
        return np.full(history.rows, self.is_final(history.exits, j))

    def nodes(self, at: Any) -> Any:
        """Nothing to decide."""
        return None


@register_policy
class FixedDepthPolicy(UnconditionalPolicy):
    """Every row stops at block `depth`: the line that any dynamic policy has to beat. `decide_every` has no meaning
    here, as there is nothing to decide."""

    name = "fixed_depth"
    takes_depth = True

    def is_final(self, exits: Sequence[int], j: int) -> bool:
        """At `depth`, unless `min_exit` is deeper."""
        low = self.config.min_exit
        at_depth = exits[j] == self.config.depth and (low is None or exits[j] >= low)
        return at_depth or super().is_final(exits, j)

    @classmethod
    def check_config(cls, config: EarlyExitConfig) -> None:
        """`depth` has no default."""
        if config.depth is None:
            raise ValueError(
                "policy='fixed_depth' needs depth: the number of the block that answers (1 is the first)."
            )

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """`depth` must be a block with an exit."""
        super().check(exits, num_labels, problem_type)
        if self.config.depth not in exits:
            raise ValueError(f"depth={self.config.depth} is not allowed: the model has exits at blocks {list(exits)}.")

    def grid(self, exits: Sequence[int], problem_type: str) -> list[EarlyExitConfig]:
        """Each depth at which `min_exit` and `max_exit` let a row stop; where none lies between the two, the deepest
        up to `max_exit`, which is the one that answers then."""
        low, cap = self.config.min_exit, self.max_exit
        super().check(exits, 1, problem_type)
        reached = [m for m in exits if cap is None or m <= cap]
        within = [m for m in reached if low is None or m >= low] or reached[-1:]
        return [replace(self.config, depth=m) for m in reversed(within)]


@register_policy
class NeverPolicy(UnconditionalPolicy):
    """No row stops before the last exit (or `max_exit`)."""

    name = "never"
