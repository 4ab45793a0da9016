"""What the models of `agreement` read off the exits so far."""

from __future__ import annotations

import numpy as np

from badge_peft.early_exit.divergences import max_entropy
from badge_peft.early_exit.history import ExitHistory

Array = np.ndarray
LIMIT = np.float32(50)  # features are clipped here: beyond it they say nothing new


def features(history: ExitHistory, j: int) -> Array:
    """[n, F]: what the model of exit j (index) reads, from the exits up to j; F is smaller for the first exit.

    All are finite for any logits, and none depends on the other rows.
    """
    columns = (_class_features if history.problem.gives_labels else _regression_features)(history, j)
    return np.clip(np.stack(columns, axis=-1), -LIMIT, LIMIT)


def _class_features(history: ExitHistory, j: int) -> list[Array]:
    scale = np.float32(max_entropy(history.num_labels, history.problem_type))
    sure = history.confidence(j)
    complement = np.maximum(1 - sure, np.float32(1e-6))
    columns = [
        history.entropy(j) / scale,
        sure,
        np.log(np.maximum(sure, np.float32(1e-6)) / complement),
        history.margin(j),
    ]
    if j:
        earlier = history.to_earlier("ce", j) / scale  # [j, n]
        same = (history.to_earlier("label", j) == 0).mean(axis=0, dtype=np.float32)
        columns += [earlier.min(axis=0), earlier[-1], _mean(earlier), history.to_previous("kl", j) / scale, same]
        columns.append(history.confidence(j - 1))
    return columns


def _regression_features(history: ExitHistory, j: int) -> list[Array]:
    columns = [history.logits[j].mean(axis=-1)]
    if j:
        earlier = history.to_earlier("ce", j)  # |y_j - y_i|: [j, n]
        columns += [earlier.min(axis=0), earlier[-1], _mean(earlier), earlier.max(axis=0)]
    return columns


def _mean(values: Array) -> Array:
    """[j, n] -> [n], added one by one: the order in which numpy sums the first axis depends on n."""
    return sum(values[1:], start=values[0]) / np.float32(len(values))
