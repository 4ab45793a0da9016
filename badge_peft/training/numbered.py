"""Rows that come with their numbers, so that a batch says whose states it wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset

ROWS = "cached_rows"  # in a batch: [B]


class NumberedRows(Dataset):
    """A map-style data set whose rows are (number, row). Where its items are whole batches, lists of rows, the number
    is a range: their rows are numbered through."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        counts = [len(rows[i]) for i in range(len(rows))] if holds_batches(rows) else None
        self._starts = None if counts is None else [0, *accumulate(counts)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[int | range, Any]:
        return self._number(i), self.rows[i]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[int | range, Any]]:
        """Several at once, where the data set can."""
        many = getattr(self.rows, "__getitems__", None)
        found = [self.rows[i] for i in numbers] if many is None else many(numbers)
        return list(zip(map(self._number, numbers), found, strict=True))

    def _number(self, i: int) -> int | range:
        return i if self._starts is None else range(self._starts[i], self._starts[i + 1])


def holds_batches(rows: Any) -> bool:
    """Whether the items of a data set are lists of rows."""
    return hasattr(rows, "__len__") and len(rows) > 0 and isinstance(rows[0], list)


def flat_rows(rows: Any) -> list[Any]:
    """The rows of a data set, or of all of its items."""
    items = [rows[i] for i in range(len(rows))]
    return [row for item in items for row in item] if holds_batches(rows) else items


def unnumbered(rows: Any) -> Any:
    """The data set inside of `NumberedRows`; any other as it is."""
    return rows.rows if isinstance(rows, NumberedRows) else rows


class NumberedCollator:
    """Batches of `NumberedRows`."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[tuple[int | range, Any]]) -> Any:
        """The batch, with `ROWS`."""
        batch = self.collate([row for _, row in rows])
        numbers = [n for number, _ in rows for n in (number if isinstance(number, range) else [number])]
        batch[ROWS] = torch.tensor(numbers)
        return batch
