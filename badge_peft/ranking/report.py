"""`ExitReport`: what a ranking has cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class ExitReport:
    """What one call of `rank` did.

    Args:
        candidates: How many there were, N.
        num_blocks: M.
        blocks_run: Over all candidates; full depth is N * M.
        left: Block number of each exit -> candidates that went on behind it; 0 behind the last.
        cut: Candidates that were longer than the model reads, and were cut.
        exit_layer: [N], the block that each candidate stopped at.
    """

    candidates: int
    num_blocks: int
    blocks_run: int
    left: dict[int, int]
    cut: int
    exit_layer: np.ndarray = field(repr=False)

    @property
    def blocks_saved(self) -> float:
        """Share of full depth's blocks that were not run."""
        return 1 - self.blocks_run / (self.candidates * self.num_blocks)
