"""`Units`: what leaves a batch as one, and is drawn and counted as one: a row or, where rows are tokens, a text."""

from __future__ import annotations

from functools import cached_property

import numpy as np

Array = np.ndarray


class Units:
    """U units of N rows.

    Args:
        rows: N.
        texts: [N], a number for each row, the same for all rows of a text, which lie side by side. None: each row is
            a unit by itself.
    """

    def __init__(self, rows: int, texts: Array | None = None) -> None:
        self.rows = rows
        self._first: Array = np.ones(rows, dtype=bool) if texts is None else np.append(True, texts[1:] != texts[:-1])
        self._are_rows = bool(self._first.all())

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def first(self) -> Array:
        """[N] bool: the rows with which a unit begins."""
        return self._first

    @cached_property
    def starts(self) -> Array:
        """[U]: the first row of each."""
        return np.flatnonzero(self._first)

    @cached_property
    def sizes(self) -> Array:
        """[U]: how many rows each has."""
        return np.diff(np.append(self.starts, self.rows))

    def largest(self, values: Array) -> Array:
        """[..., N] -> [..., U]: the largest value of each; of blocks, where the unit leaves."""
        return values if self._are_rows else np.maximum.reduceat(values, self.starts, axis=-1)

    def total(self, values: Array) -> Array:
        """[..., N] -> [..., U]: the sum in each."""
        return values if self._are_rows else np.add.reduceat(values, self.starts, axis=-1)

    def rows_of(self, units: Array) -> Array:
        """[u] -> [n]: the rows of these units, in their order."""
        if self._are_rows:
            return units
        sizes = self.sizes[units]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(self.starts[units], sizes) + within
