"""The problem types of transformers, each with all that depends on it: loss, labels, predictions, metric, and how an
answer is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.utils.checks import check_choice

Array = np.ndarray
NO_LABEL = -100  # as torch's cross-entropy has it: the row is not trained on, and not scored
UNKNOWN_LABEL = -200  # of a class that the model lacks, among rows to score: whatever the model answers is wrong


class Problem:
    """One class per row: `single_label_classification`. The base of the others.

    Attributes:
        name: As transformers has it.
        default_metric: As for `exit_scores`.
        error_metric: The metric that counts every row alike, by which exits are compared.
        gives_labels: Whether a row is answered with labels and probabilities, not with values.
        many_labels: Whether a row may have several.
    """

    name = "single_label_classification"
    default_metric = "accuracy"
    error_metric = "accuracy"
    gives_labels = True
    many_labels = False

    def loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """As transformers computes it for its own head: logits [B, K] in float32, labels [B] or [B, K]."""
        labels = labels.reshape(-1).long()  # the only whole numbers that torch's loss takes, but bytes
        if reduction != "mean":
            return F.cross_entropy(logits, labels, reduction=reduction)
        count = (labels != NO_LABEL).sum().clamp(min=1)  # a batch without a label has no loss, and not NaN
        return F.cross_entropy(logits, labels, reduction="sum") / count

    def error(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B]: how wrong each row is, 1 or 0; for regression |tanh(y' - y)|. Source: BERxiT, section 4.2."""
        return (logits.argmax(dim=-1) != labels.reshape(-1)).float()

    def has_label(self, labels: Tensor) -> Tensor:
        """[B]: which rows count."""
        return labels.reshape(-1) != NO_LABEL

    def check_labels(self, labels: Tensor, num_labels: int, batch_size: int) -> None:
        """Refuses labels that a loss would turn into a crash or, worse, into nonsense."""
        if labels.numel() != batch_size:
            raise ValueError(f"labels have shape {list(labels.shape)}, but the batch has {batch_size} rows.")
        if labels.is_floating_point():
            raise ValueError(f"{self.name} needs whole-number labels, got {labels.dtype}.")
        wrong = (labels != NO_LABEL) & ((labels < 0) | (labels >= num_labels))
        if wrong.any():
            row = _first_row(wrong, batch_size)
            raise ValueError(
                f"label {labels.reshape(-1)[row].item()} of row {row} is out of range: the model has num_labels="
                f"{num_labels}, so labels are 0 to {num_labels - 1}. Load the model with the right num_labels."
            )

    def scored_labels(self, labels: Tensor, num_labels: int, rows: int) -> Tensor:
        """The labels of rows to score, in the shape of `label_shape`."""
        missing = ~self.has_label(labels)
        if missing.any():
            row = _first_row(missing, len(labels))
            raise ValueError(f"row {row} has the label {NO_LABEL}, which means none: leave out such rows.")
        self.check_labels(labels.masked_fill(labels == UNKNOWN_LABEL, 0), num_labels, rows)
        return labels.reshape(self.label_shape(rows, num_labels))

    def label_shape(self, rows: int, num_labels: int) -> tuple[int, ...]:
        """Shape of the labels of a data set."""
        return (rows,)

    def targets(self, labels: Tensor) -> Array:
        """Labels as `predictions` has them."""
        return labels.numpy()

    def predictions(self, logits: Tensor) -> Array:
        """Logits [N, K] to class numbers [N], 0 / 1 decisions [N, K] (multi-label) or values (regression)."""
        return logits.argmax(dim=-1).numpy()

    def probabilities(self, logits: Array) -> Array | None:
        """[K] logits to [K] probabilities, of one label or of each; None for regression."""
        values = torch.from_numpy(logits)
        return (values.sigmoid() if self.many_labels else values.softmax(-1)).numpy() if self.gives_labels else None

    def same(self, logits: Tensor, others: Tensor) -> float | None:
        """Share of rows [N, K] with the same prediction; None for regression, which has none that is the same."""
        if not self.gives_labels:
            return None
        return float((~differs(self.predictions(logits), self.predictions(others))).mean())

    def format_prediction(self, logits: Array, names: Sequence[str]) -> dict[str, Any]:
        """One row of logits [K] as JSON-able values: `label` and `score` (the label's probability); `labels` and
        the score of the least sure decision, where a row may have several; `value`, a number or a list of them,
        for regression."""
        with np.errstate(over="ignore", invalid="ignore"):
            weights = np.exp(logits - logits.max())
            best = int(logits.argmax())
            return {"label": names[best], "score": json_number(weights[best] / weights.sum())}


class MultiLabel(Problem):
    """Any number of labels per row, each a yes-or-no decision of its own."""

    name = "multi_label_classification"
    many_labels = True

    def loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.view_as(logits).float(), reduction=reduction)

    def error(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits > 0) != (labels.view_as(logits) > 0.5)).any(dim=-1).float()

    def has_label(self, labels: Tensor) -> Tensor:
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)

    def check_labels(self, labels: Tensor, num_labels: int, batch_size: int) -> None:
        if labels.numel() != batch_size * num_labels:
            raise ValueError(
                f"labels have shape {list(labels.shape)}; {self.name} with num_labels={num_labels} needs "
                f"[{batch_size}, {num_labels}]."
            )
        wrong = ~labels.isfinite()
        if self.gives_labels:
            wrong |= (labels < 0) | (labels > 1)
        if wrong.any():
            row = _first_row(wrong, batch_size)
            raise ValueError(
                f"row {row} has the label {labels.reshape(batch_size, -1)[row].tolist()}: {self.name} needs "
                f"{'numbers from 0 to 1' if self.gives_labels else 'finite numbers'}. Fix the row, or leave it out."
            )

    def label_shape(self, rows: int, num_labels: int) -> tuple[int, ...]:
        return (rows, num_labels)

    def targets(self, labels: Tensor) -> Array:
        return (labels > 0.5).long().numpy()

    def predictions(self, logits: Tensor) -> Array:
        return (logits > 0).long().numpy()

    def format_prediction(self, logits: Array, names: Sequence[str]) -> dict[str, Any]:
        with np.errstate(over="ignore", invalid="ignore"):
            sure = (1 / (1 + np.exp(-np.abs(logits)))).min()  # the larger of p and 1 - p
        chosen = [name for name, value in zip(names, logits, strict=True) if value > 0]
        return {"labels": chosen, "score": json_number(sure)}


class Regression(MultiLabel):
    """A number per row, or several; labels have the shape of the outputs, as those of several labels have."""

    name = "regression"
    default_metric = "pearson"
    error_metric = "neg_mse"
    gives_labels = False
    many_labels = False

    def loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return F.mse_loss(logits, labels.view_as(logits).float(), reduction=reduction)

    def error(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.float() - labels.view_as(logits)).tanh().abs().mean(dim=-1)

    def label_shape(self, rows: int, num_labels: int) -> tuple[int, ...]:
        return (rows,) if num_labels == 1 else (rows, num_labels)

    def targets(self, labels: Tensor) -> Array:
        return labels.numpy()

    def predictions(self, logits: Tensor) -> Array:
        return logits.float().squeeze(-1).numpy()

    def format_prediction(self, logits: Array, names: Sequence[str]) -> dict[str, Any]:
        values = [json_number(value) for value in logits]
        return {"value": values[0] if len(values) == 1 else values}


_PROBLEMS = {problem.name: problem for problem in (Problem(), MultiLabel(), Regression())}
PROBLEM_TYPES = tuple(_PROBLEMS)


def problem_of(problem_type: str) -> Problem:
    """The problem type by its name in transformers."""
    check_choice("problem_type", problem_type, PROBLEM_TYPES)
    return _PROBLEMS[problem_type]


def differs(first: Array, second: Array) -> Array:
    """[N] bool: which predictions, [N] or [N, K], are not the same."""
    different = first != second
    return different if different.ndim == 1 else different.any(axis=1)


def infer_problem_type(num_labels: int, labels: Tensor | None = None) -> str:
    """What transformers would infer from the number of labels and the labels' type. Without labels, one output is
    taken for a value and several for classes."""
    if num_labels == 1:
        return Regression.name
    return MultiLabel.name if labels is not None and labels.is_floating_point() else Problem.name


def _first_row(wrong: Tensor, rows: int) -> int:
    return int(wrong.reshape(rows, -1).any(dim=1).nonzero()[0])


def json_number(value: Any) -> float | None:
    """With six digits behind the point; None in the place of NaN and infinity, which JSON does not have."""
    return round(float(value), 6) if math.isfinite(value) else None
