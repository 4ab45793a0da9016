"""Paired differences between two ways to train, and their intervals over seeds and test rows.

The bootstrap draws seeds, and rows for all seeds and both ways alike, so that what is hard for both does not count.
Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentiles).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from badge_peft.evaluation import ExitLogits
from badge_peft.utils.problem import problem_of

Array = np.ndarray
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Gain:
    """How far one way is ahead of another, in points: the mean over so many seeds, and its interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def text(self) -> str:
        """`+1.2 [+0.3, +2.1]`."""
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def gains(first: dict[int, ExitLogits], second: dict[int, ExitLogits], metric: str) -> dict[str, Gain] | None:
    """S-avg (`avg`) and S-best (`best`) of the first less those of the second, whose logits by seed are of the same
    test rows; None where they share no seed."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    n = len(first[seeds[0]])
    draw = np.random.default_rng(0)
    counts = np.concatenate([np.ones((1, n)), draw.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)])  # [1 + R, N]
    drawn = draw.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=RESAMPLES) / len(seeds)  # [R, S]
    found = {}
    scores = [[exit_scores_of(way[seed], metric, counts) for seed in seeds] for way in (first, second)]
    for name, over_exits in (("avg", np.mean), ("best", np.max)):
        ours, others = (100 * np.stack([over_exits(one, axis=1) for one in way]) for way in scores)  # [S, 1 + R]
        difference = ours - others
        resampled = (difference[:, 1:].T * drawn).sum(axis=1)
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = Gain(float(difference[:, 0].mean()), float(low), float(high), len(seeds))
    return found


def exit_scores_of(logits: ExitLogits, metric: str, counts: Array) -> Array:
    """[R, E]: the score of each exit behind a block, where row n is there `counts` [R, N] times."""
    assert logits.labels is not None
    labels = logits.labels.numpy()
    problem = problem_of(logits.kind)
    behind = [j for j, m in enumerate(logits.exits) if m > 0]
    answers = [problem.predictions(logits.logits[:, j]) for j in behind]
    return np.stack([WEIGHTED[metric](answer, labels, counts) for answer in answers], axis=1)


def _accuracy(predictions: Array, labels: Array, counts: Array) -> Array:
    return counts @ (predictions == labels) / counts.sum(axis=1)


def _f1_of(predictions: Array, labels: Array, counts: Array, classes: Array) -> tuple[Array, Array]:
    """[R, C]: F1 of each class, and whether it is there at all."""
    said = predictions[:, None] == classes
    true = labels[:, None] == classes
    right = counts @ (said & true)
    seen = counts @ (said.astype(float) + true)
    return 2 * right / np.maximum(seen, 1), seen > 0


def _acc_and_f1(predictions: Array, labels: Array, counts: Array) -> Array:
    f1, _ = _f1_of(predictions, labels, counts, np.array([1]))
    return (_accuracy(predictions, labels, counts) + f1[:, 0]) / 2


def _macro_f1(predictions: Array, labels: Array, counts: Array) -> Array:
    f1, there = _f1_of(predictions, labels, counts, np.union1d(predictions, labels))
    return (f1 * there).sum(axis=1) / there.sum(axis=1)


def _pearson(predictions: Array, labels: Array, counts: Array) -> Array:
    x = predictions.astype(np.float64)
    y = labels.astype(np.float64)
    n = counts.sum(axis=1)
    mean_x, mean_y = counts @ x / n, counts @ y / n
    both, of_x, of_y = (counts @ z / n for z in (x * y, x * x, y * y))
    spread = np.sqrt(np.maximum((of_x - mean_x**2) * (of_y - mean_y**2), 0))
    return np.where(spread > 0, (both - mean_x * mean_y) / np.where(spread > 0, spread, 1), 0.0)


#: The metrics of `badge_peft.evaluation` with a count for each row: predictions and labels [N], counts [R, N] -> [R].
WEIGHTED: dict[str, Callable[[Array, Array, Array], Array]] = {
    "accuracy": _accuracy,
    "acc_and_f1": _acc_and_f1,
    "macro_f1": _macro_f1,
    "pearson": _pearson,
}
