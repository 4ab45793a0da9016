"""How long a batch takes in a replica, by its rows and by where they stop: fitted to measured batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

Array = np.ndarray


@dataclass(frozen=True)
class ServiceTimes:
    """Seconds of a pass: `call + row n + block D + active A`, for n rows of which the deepest stops at block D and
    which go through A blocks altogether.

    Args:
        call: For the pass.
        row: For each row: tokens, embeddings, answer.
        block: For each block that some row needs.
        active: For each block of each row.
        ratios: Measured over fitted seconds of the batches, which a simulation draws from.
        pass_rows: Rows of a pass: more make several.
    """

    call: float
    row: float
    block: float
    active: float
    ratios: tuple[float, ...] = (1.0,)
    pass_rows: int = 32

    @classmethod
    def fit(cls, batches: Sequence[dict[str, Any]], pass_rows: int = 32) -> ServiceTimes:
        """By least squares of the relative errors, without negative times.

        Args:
            batches: Of each its `exits`, the block that answered each row, and `seconds`.
            pass_rows: As above; no batch has more.
        """
        features = np.array([_features(np.array(batch["exits"]), pass_rows) for batch in batches])
        seconds = np.array([batch["seconds"] for batch in batches])
        found, _ = nnls(features / seconds[:, None], np.ones(len(seconds)))
        ratios = seconds / (features @ found)
        return cls(*map(float, found), tuple(float(ratio) for ratio in ratios), pass_rows)

    def mean(self, exits: Array) -> float:
        """Fitted seconds of rows that stop at `exits` [n]."""
        return float(_features(exits, self.pass_rows) @ (self.call, self.row, self.block, self.active))

    def draw(self, exits: Array, random: np.random.Generator) -> float:
        """The same with a measured ratio, drawn at random."""
        return self.mean(exits) * self.ratios[int(random.integers(len(self.ratios)))]

    @property
    def error(self) -> float:
        """Median of |measured / fitted - 1|."""
        return float(np.median(np.abs(np.array(self.ratios) - 1)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def _features(exits: Array, pass_rows: int) -> Array:
    starts = np.arange(0, len(exits), pass_rows)
    deepest = np.maximum.reduceat(exits, starts).sum()
    return np.array([len(starts), len(exits), deepest, exits.sum()], dtype=float)
