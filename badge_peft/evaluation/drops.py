"""How much settings lose against an exit that answers every row, and how sure that is.

A loss that is counted is noisy: of 500 rows a setting may change the answers of 25, and the count of those that turn
wrong has a standard error of a point. Where rows have one label, the exit that drops are counted from says more: by
its own probabilities, calibrated with one temperature on these rows, each changed answer is right with a known
probability. The estimate lies between this *expected* loss and the counted one, nearer to the count the more rows
there are. What an early exit found is not in these probabilities, so the expected loss is rather too large.

Sources: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (the temperature); Efron and Morris,
"Stein's Estimation Rule and Its Competitors", 1973 (shrinkage); Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 11 (the jackknife).
"""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.confidence import fitted_temperatures
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric, is_ratio, ratio_parts, scorer
from badge_peft.utils.problem import problem_of

Array = np.ndarray
BIAS = 0.75  # how far, as a share of itself, the expected loss is taken to be from the true one
_GROUPS = 10  # of the jackknife, for scores that are no ratio of sums


class Drops:
    """What settings lose on rows with labels against the exit after block `reference`."""

    def __init__(self, exit_logits: ExitLogits, reference: int, metric: Metric) -> None:
        self.exit_logits, self.metric, self.reference = exit_logits, metric, reference
        self.inputs = _distinct(exit_logits)
        self._first = exit_logits.exits.index(reference)
        self._order = np.argsort(self.inputs, kind="stable")
        self._starts = np.searchsorted(self.inputs[self._order], np.arange(self.inputs.max() + 1))
        self._by_label = metric == "accuracy" and not problem_of(exit_logits.kind).many_labels
        if self._by_label:
            self._right = (exit_logits.predictions == exit_logits.targets).astype(np.float64)
            self._likely = _likely_right(exit_logits, self._first)

    def of(self, stops: Array) -> tuple[Array, Array, Array]:
        """For the blocks [S, N] at which rows stop: the drop [S], as it is estimated; its standard error [S], which
        counts one input more that was lost, as nothing is known of answers that did not change; the drop [S] as
        counted."""
        if self._by_label:
            return self._of_labels(stops)
        stops, places = np.unique(stops, axis=0, return_inverse=True)
        drops, errors = self._of_ratio(stops) if is_ratio(self.metric) else self._of_score(stops)
        places = places.reshape(-1)
        return drops[places], errors[places], drops[places]

    def _of_labels(self, stops: Array) -> tuple[Array, Array, Array]:
        """Between the counted and the expected loss."""
        n, different = len(self.exit_logits), int(self.inputs.max()) + 1
        exits = np.searchsorted(self.exit_logits.exits, stops)
        counted, expected = (
            self._by_input(values[self._first] - np.take_along_axis(values, exits, axis=0))
            for values in (self._right, self._likely)
        )
        beyond = counted - expected

        def variance(values: Array) -> Array:
            return np.square(values - values.mean(axis=1, keepdims=True)).sum(axis=1) / n**2

        drop, noise = expected.sum(axis=1) / n, variance(beyond) + 1 / different**2
        weight = 1 / (1 + noise / np.maximum(BIAS * drop, 1e-12) ** 2)
        error = np.sqrt(variance(expected) + weight**2 * noise + 1 / different**2)
        return drop + weight * beyond.sum(axis=1) / n, error, counted.sum(axis=1) / n

    def _by_input(self, values: Array) -> Array:
        """[S, N] -> [S, D]: the sum over each different input."""
        units = self.exit_logits.units.total(values)
        if len(self._starts) == len(self.inputs):
            return units
        return np.add.reduceat(units[:, self._order], self._starts, axis=1)

    def _of_ratio(self, stops: Array) -> tuple[Array, Array]:
        """Of a ratio of sums over units; the error to first order."""
        n, different = len(self.exit_logits.units), int(self.inputs.max()) + 1
        first, *answers = self._answers(stops)
        above, below = ratio_parts(self.exit_logits, first, self.metric)
        base = above.sum() / max(below.sum(), 1)
        drops, errors = np.empty(len(answers)), np.empty(len(answers))
        own = (above - base * below) / max(below.mean(), 1e-12)  # what each unit adds to the score, to first order
        for i, answer in enumerate(answers):
            a, b = ratio_parts(self.exit_logits, answer, self.metric)
            score = a.sum() / max(b.sum(), 1)
            change = np.bincount(self.inputs, own - (a - score * b) / max(b.mean(), 1e-12), different)
            drops[i], errors[i] = base - score, np.sqrt(np.square(change).sum() / n**2 + 1 / different**2)
        return drops, errors

    def _of_score(self, stops: Array) -> tuple[Array, Array]:
        """Of any other score; the error by the jackknife."""
        n, different = len(self.exit_logits.units), int(self.inputs.max()) + 1
        first, *answers = self._answers(stops)
        measure, labels = scorer(self.exit_logits, self.metric), self.exit_logits.targets
        drops = measure(first) - np.array([measure(a) for a in answers])
        parts = folds_of(self.inputs, _GROUPS)
        if len(parts) < 2:
            return drops, np.abs(drops) + 1
        left = np.empty((len(parts), len(answers)))
        for g, part in enumerate(parts):
            rows = self.exit_logits.units.rows_of(np.setdiff1d(np.arange(n), part))
            scores = np.array([measure(a[rows], labels[rows]) for a in answers])
            left[g] = measure(first[rows], labels[rows]) - scores
        return drops, np.sqrt((len(parts) - 1) * left.var(axis=0) + 1 / different**2)

    def _answers(self, stops: Array) -> list[Array]:
        """What the reference answers, and what each setting does."""
        full = np.full(len(self.exit_logits), self.reference, dtype=np.int64)
        return [self.exit_logits.predicted(s) for s in (full, *stops)]


def folds_of(inputs: Array, count: int) -> list[Array]:
    """The units in at most `count` parts, those with the same number in `inputs` [U] in one."""
    different = np.random.default_rng(0).permutation(int(inputs.max()) + 1)
    return [np.flatnonzero(np.isin(inputs, part)) for part in np.array_split(different, min(count, len(different)))]


def _distinct(exit_logits: ExitLogits) -> Array:
    """[U]: a number for each unit, the same for those that every exit answers alike: one input that came twice says as
    much as once."""
    sums = exit_logits.units.total(exit_logits.logits.flatten(1).double().numpy().T).T
    return np.unique(sums.round(3), axis=0, return_inverse=True)[1].reshape(-1)


def _likely_right(exit_logits: ExitLogits, first: int) -> Array:
    """[E, N]: how likely what each exit says is right, by the probabilities of one, with the temperature that fits."""
    logits = exit_logits.logits[:, first].double().numpy()
    one = ExitHistory.of(logits[:, None], exit_logits.exits[first : first + 1], exit_logits.kind)
    (temperature,) = fitted_temperatures(one, exit_logits.targets)
    probabilities = softmax(logits / temperature, axis=-1)
    return np.take_along_axis(probabilities[None], exit_logits.predictions[..., None], axis=-1)[..., 0]
