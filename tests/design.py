"""Covering designs: a defect that two settings make together shows in some row of `pairs`, which has far fewer rows
than the cross product (Kuhn et al., "Software Fault Interactions and Implications for Software Testing", 2004)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any


def pairs(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows with a value of each factor, in which every two values of two factors meet; the same in every process.

    The largest two factors are crossed, and the row that meets most new pairs is taken next.
    """
    values: list[Sequence[Any]] = [list(factor) for factor in factors]
    missing = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(values), 2)
        for a, b in itertools.product(range(len(first)), range(len(second)))
    }
    candidates = list(itertools.product(*(range(len(factor)) for factor in values)))
    rows = []
    while missing:
        row = max(candidates, key=lambda row: len(missing & _pairs_of(row)))
        missing -= _pairs_of(row)
        rows.append(tuple(factor[i] for factor, i in zip(values, row, strict=True)))
    return rows


def _pairs_of(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(row), 2)}
