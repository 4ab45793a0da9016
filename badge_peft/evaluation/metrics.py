"""Scores: one metric, of every exit (S-avg and S-best), or of the answers of a policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from badge_peft.evaluation.entities import EntityReader, scheme_of
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.utils.checks import check_choice
from badge_peft.utils.problem import differs, problem_of

Array = np.ndarray
Metric = str | Callable[[Array, Array], float]


def _accuracy(predictions: Array, labels: Array) -> float:
    # multi-label: all labels of a row must be right, as scikit-learn has it
    return float((~differs(predictions, labels)).mean())


def _f1(predictions: Array, labels: Array) -> float:
    multi = predictions.ndim == 2
    if not multi and max(predictions.max(initial=0), labels.max(initial=0)) > 1:
        raise ValueError("metric='f1' is for two classes (the positive one is 1) or multi-label: use 'macro_f1'.")
    # of class 1, a label that the model lacks is another; or of all labels
    said, truth = predictions == 1, labels == 1
    return float(_f1_of((said & truth).sum(), said.sum() + truth.sum()))


def _macro_f1(predictions: Array, labels: Array) -> float:
    if predictions.ndim == 2:
        right, said, truth = (x.sum(axis=0) for x in (predictions * labels, predictions, labels))
    else:
        right, said, truth = _class_counts(predictions, labels)
    return float(np.mean(_f1_of(right, said + truth)))


def _matthews(predictions: Array, labels: Array) -> float:
    if predictions.ndim == 2:
        raise ValueError("metric='matthews' is for rows with one label each: use 'f1', 'macro_f1' or 'accuracy'.")
    right, said, truth = (x.astype(np.float64) for x in _class_counts(predictions, labels))
    rows = said.sum()
    spread = (rows**2 - said @ said) * (rows**2 - truth @ truth)
    return float((right.sum() * rows - said @ truth) / np.sqrt(spread)) if spread else 0.0


def _f1_of(right: Array, total: Array) -> Array:
    """2 TP / (2 TP + FP + FN); 0 where there is nothing to find and nothing was found."""
    return 2 * right / np.maximum(total, 1)


def _class_counts(predictions: Array, labels: Array) -> tuple[Array, Array, Array]:
    """How often each class that is said or true is said rightly, is said, and is true."""
    classes, codes = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    said, truth = codes[: len(predictions)], codes[len(predictions) :]
    right, said, truth = (np.bincount(x, minlength=len(classes)) for x in (said[said == truth], said, truth))
    return right, said, truth


def _pearson(predictions: Array, labels: Array) -> float:
    """The mean over the outputs, where there are several."""
    if predictions.ndim == 2:
        return float(np.mean([_pearson(p, y) for p, y in zip(predictions.T, labels.T, strict=True)]))
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0  # a constant is correlated with nothing
    return float(np.corrcoef(predictions.astype(np.float64), labels.astype(np.float64))[0, 1])


def _spearman(predictions: Array, labels: Array) -> float:
    return _pearson(rankdata(predictions, axis=0), rankdata(labels, axis=0))


# `calibrate` scores tens of thousands of samples: these are the formulas of scikit-learn and scipy without what they
# check in each call, which took 40 of 44 seconds for 2,000 rows
METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "acc_and_f1": lambda p, y: (_accuracy(p, y) + _f1(p, y)) / 2,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "pearson_and_spearman": lambda p, y: (_pearson(p, y) + _spearman(p, y)) / 2,
    "neg_mse": lambda p, y: -float(np.mean((p - y) ** 2)),
}
ENTITY_F1 = "entity_f1"  # of token classification: micro F1 of whole entities, as `seqeval` has it
METRIC_NAMES = (*METRICS, ENTITY_F1)
_REGRESSION = {"pearson", "spearman", "pearson_and_spearman", "neg_mse"}


@dataclass
class ExitScores:
    """Scores of all exits on one data set.

    Args:
        per_exit: One score per exit, shallow to deep.
        exit_layers: Their block numbers.
        metric: The metric's name.
    """

    per_exit: list[float]
    exit_layers: list[int]
    metric: str

    @property
    def avg(self) -> float:
        """S-avg: the mean over all exits."""
        return float(np.mean(self.per_exit))

    @property
    def best(self) -> float:
        """S-best: the best exit's score."""
        return float(np.max(self.per_exit))

    @property
    def best_exit(self) -> int:
        """Block number of the best exit; of several, the shallowest."""
        return self.exit_layers[int(np.argmax(self.per_exit))]


def exit_scores(exit_logits: ExitLogits, metric: Metric = "accuracy") -> ExitScores:
    """The score of every exit.

    Args:
        exit_logits: With labels.
        metric: A name in `METRIC_NAMES` or a callable `(predictions, labels) -> float`; predictions are class numbers
            [N], 0 / 1 decisions [N, K] (multi-label) or values [N] or [N, K] (regression).

    Raises:
        ValueError: no labels, an unknown metric, one that does not suit the problem type, or one that gives NaN.
    """
    measure = scorer(exit_logits, metric)
    per_exit = [measure(predictions) for predictions in exit_logits.predictions]
    return ExitScores(per_exit, list(exit_logits.exits), metric_name(metric))


def metric_name(metric: Metric) -> str:
    """What a record calls a metric: a function's name, for a `functools.partial` that of the function inside, for any
    other callable that of its class."""
    if isinstance(metric, str):
        return metric
    while isinstance(metric, partial):
        metric = metric.func
    return getattr(metric, "__name__", type(metric).__name__)


def score(exit_logits: ExitLogits, answers: Tensor, metric: Metric = "accuracy") -> float:
    """The score of `answers` [N, K] (logits) against the labels of `exit_logits`."""
    return scorer(exit_logits, metric)(problem_of(exit_logits.kind).predictions(answers))


def scorer(exit_logits: ExitLogits, metric: Metric = "accuracy") -> Callable[..., float]:
    """A function of predictions [N] (or [N, K]) that gives their score; where these are of some of the rows alone, it
    takes the labels of these, too."""
    problem, labels, name = problem_of(exit_logits.kind), exit_logits.targets, metric_name(metric)
    if isinstance(metric, str):
        check_choice("metric", metric, METRIC_NAMES)
        fitting = [known for known in METRICS if (known in _REGRESSION) != problem.gives_labels]
        fitting += [ENTITY_F1] if exit_logits.texts is not None else []
        if metric not in fitting:
            raise ValueError(f"metric={metric!r} does not suit {problem.name}: use {', '.join(fitting)}.")
        if metric == ENTITY_F1:
            return partial(_entity_f1, exit_logits)
        metric = METRICS[metric]
    measure = metric

    def measured(predictions: Array, labels: Array = labels) -> float:
        value = float(measure(predictions, labels))  # a plain number, for JSON
        if not math.isfinite(value):
            raise ValueError(
                f"metric={name!r} gives {value} on {len(labels)} rows, and nothing can be chosen by it: "
                "it must give a finite number for any predictions, 0 where it is not defined."
            )
        return value

    return measured


def _entity_f1(exit_logits: ExitLogits, predictions: Array) -> float:
    above, below = ratio_parts(exit_logits, predictions, ENTITY_F1)
    return float(above.sum() / max(below.sum(), 1))


def is_ratio(metric: Metric) -> bool:
    """Whether a score is a ratio of two sums over rows or texts, which `ratio_parts` gives."""
    return metric in ("accuracy", ENTITY_F1)


def ratio_parts(exit_logits: ExitLogits, predictions: Array, metric: Metric) -> tuple[Array, Array]:
    """[U] and [U]: what is summed over the units above and below the line of a score that `is_ratio`. Accuracy: rows
    that are right, of all. Entity F1: twice the entities that are right, of those that are given and answered."""
    units, labels = exit_logits.units, exit_logits.targets
    if metric != ENTITY_F1:
        right = (~differs(predictions, labels)).astype(np.float64)
        return units.total(right), units.total(np.ones(len(right)))
    both, answered, given = entity_reader(exit_logits).counts(predictions, labels, units)
    return 2.0 * both, (answered + given).astype(np.float64)


def entity_reader(exit_logits: ExitLogits) -> EntityReader:
    """What reads entities out of the labels of token classification."""
    names = exit_logits.label_names
    if names is None or scheme_of(names) is None:
        found = "have no names" if names is None else f"are {', '.join(names[:5])}"
        raise ValueError(
            f"metric={ENTITY_F1!r} reads entities out of tags (IOB1, IOB2, IOBES, BILOU), and the labels {found}: "
            "name them so in the model's id2label, or use metric='accuracy'."
        )
    return EntityReader(names)
