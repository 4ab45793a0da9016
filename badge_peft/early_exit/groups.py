"""Groups of rows that are decided on together: the candidates of a query."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def group_codes(groups: Any, rows: int) -> Array | None:
    """[n] whole numbers, the same for rows of one group; None stands for one group of all rows.

    Args:
        groups: [n], one id for each row: numbers or strings, a list, an array or a tensor.
        rows: n.

    Raises:
        ValueError: not one id for each row, a NaN, or ids of several kinds.
    """
    if groups is None:
        return None
    given = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    ids = np.asarray(given)
    if ids.shape != (rows,):
        raise ValueError(
            f"groups has shape {list(ids.shape)} for {rows} rows: give one id for each row, such as the number of its "
            "query."
        )
    if ids.dtype.kind == "f" and np.isnan(ids).any():
        raise ValueError("groups has a NaN, which is no id: give one for each row, such as the number of its query.")
    try:
        if ids.dtype.kind == "U" and not all(isinstance(each, str) for each in given):
            raise TypeError  # of which numpy has made strings, the same one of 1 and "1"
        return np.unique(ids, return_inverse=True)[1].reshape(rows)
    except TypeError:
        kinds = ", ".join(sorted({type(each).__name__ for each in given}))
        raise ValueError(f"groups has ids of several kinds ({kinds}): give numbers alone, or strings alone.") from None


def kth_best(scores: Array, groups: Array | None, k: int) -> Array:
    """[n]: for each row the k-th largest score of its group; -inf where the group has fewer than k rows.

    Args:
        scores: [n]; -inf counts as no score.
        groups: [n], as `group_codes` gives them.
        k: 1 or more.
    """
    n = len(scores)
    if groups is None:
        best = np.partition(scores, n - k)[n - k] if k <= n else -np.inf
        return np.full(n, best, dtype=scores.dtype)
    order = np.lexsort((-scores, groups))  # group by group, the best first
    counts = np.bincount(groups)
    place = np.cumsum(counts) - counts + k - 1  # of the k-th best of each group
    enough = counts >= k
    bars = np.full(len(counts), -np.inf, dtype=scores.dtype)
    bars[enough] = scores[order[place[enough]]]
    return bars[groups]
