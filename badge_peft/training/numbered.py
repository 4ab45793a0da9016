"""Rows that come with their numbers, so that a batch says whose states it wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

ROWS = "cached_rows"  # in a batch: [B]


class NumberedRows(Dataset):
    """A map-style data set whose rows are (number, row).

    Args:
        rows: The data set.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.rows[i]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[int, Any]]:
        """Several at once, where the data set can."""
        many = getattr(self.rows, "__getitems__", None)
        found = [self.rows[i] for i in numbers] if many is None else many(numbers)
        return list(zip(numbers, found, strict=True))


def unnumbered(rows: Any) -> Any:
    """The data set inside of `NumberedRows`; any other as it is."""
    return rows.rows if isinstance(rows, NumberedRows) else rows


class NumberedCollator:
    """Batches of `NumberedRows`.

    Args:
        collate: Makes a batch of the rows alone.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[tuple[int, Any]]) -> Any:
        """The batch, with `ROWS`."""
        batch = self.collate([row for _, row in rows])
        batch[ROWS] = torch.tensor([number for number, _ in rows])
        return batch
