"""What an exit learns from: the rows of a batch, `Criterion`, the loss against labels as the arguments of a training
want it, and the one against another exit's distribution. A row is a text or, where a model reads tokens, a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.outputs import MultiExitOutput
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.losses import exit_loss
from badge_peft.utils.checks import is_number
from badge_peft.utils.problem import NO_LABEL, Problem, problem_of


def rows_of_loss(
    exit_logits: Tensor, uncertainties: Tensor | None, labels: Tensor | None, mask: Tensor | None, config: BadgeConfig
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """The logits of each exit [n, K], the labels and the uncertainties [n, E] that the loss reads of a batch: of exit
    logits [B, E, K], or of tokens [B, E, S, K], of which padding is no row."""
    logits = list(exit_logits.unbind(dim=1))
    if not config.reads_tokens:
        return logits, labels, uncertainties
    real = slice(None) if mask is None else mask.flatten() != 0
    logits = [x.flatten(0, 1)[real] for x in logits]
    labels = None if labels is None else labels.flatten()[real]
    if uncertainties is not None:
        uncertainties = uncertainties.transpose(1, 2).flatten(0, 1)[real]
    return logits, labels, uncertainties


def rows_of_scores(
    exit_logits: np.ndarray, label_ids: np.ndarray, exits: list[int], config: BadgeConfig, names: list[str]
) -> ExitLogits:
    """What an evaluation scores: of exit logits [N, E, K], or of tokens [N, S, E, K], the rows that have a label."""
    problem, labels = problem_of(config.resolved_problem_type), torch.from_numpy(np.asarray(label_ids))
    if not config.reads_tokens:
        counts = problem.has_label(labels)
        return ExitLogits(torch.from_numpy(exit_logits)[counts], labels[counts], exits, problem.name)
    texts = torch.arange(len(labels)).unsqueeze(1).expand_as(labels).flatten()
    logits, labels = torch.from_numpy(exit_logits).flatten(0, 1), labels.flatten()
    counts = problem.has_label(labels)
    return ExitLogits(logits[counts], labels[counts], exits, problem.name, texts=texts[counts], label_names=names)


@dataclass(frozen=True)
class Criterion:
    """The loss of the problem type, with label smoothing and class weights (one for each class; the mean is a weighted
    one), or Trainer's `compute_loss_func` in its place, which is called for each exit, with `num_items_in_batch`, how
    many labels of these rows count."""

    label_smoothing: float = 0.0
    class_weights: list[float] | None = None
    function: Callable[..., Tensor] | None = None

    def __call__(self, logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
        """Scalar: of logits [B, K] and labels as `exit_loss` takes them."""
        if self.function is not None:
            return self.function(MultiExitOutput(logits=logits), labels, num_items_in_batch=(labels != -100).sum())
        if not self.label_smoothing and self.class_weights is None:
            return exit_loss(logits, labels, problem_type)
        weight = torch.tensor(self.class_weights or [1.0] * logits.shape[-1], device=logits.device)
        labels = labels.reshape(-1).long()
        smoothing = self.label_smoothing
        loss = F.cross_entropy(logits.float(), labels, weight, reduction="sum", label_smoothing=smoothing)
        total = weight[labels[labels != NO_LABEL]].sum()
        return loss / total if total > 0 else 0 * loss  # a batch of which nothing counts has no loss, and not NaN

    def check(self, problem_type: str, num_labels: int, reads_labels: bool) -> None:
        """Refuses what would be left out without a word."""
        given = [f"label_smoothing_factor={self.label_smoothing}"] if self.label_smoothing else []
        given += [] if self.class_weights is None else [f"class_weights={self.class_weights}"]
        if given and problem_type != Problem.name:
            raise ValueError(
                f"{given[0]} is not allowed for {problem_type}: it needs one class per row. Leave it out, or write "
                "the loss as compute_loss_func."
            )
        if given and self.function is not None:
            raise ValueError(f"{given[0]} would be ignored with compute_loss_func: make it a part of that function.")
        if self.class_weights is not None and len(self.class_weights) != num_labels:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} numbers, but the model has {num_labels} classes: give "
                "one for each."
            )
        if not reads_labels and (given or self.function is not None):
            raise ValueError(
                f"{given[0] if given else 'compute_loss_func'} would be ignored: the objective reads no label. Leave "
                "it out, or use an objective with distillation below 1."
            )


def check_class_weights(weights: Any) -> list[float]:
    """What `class_weights` may be, a list, an array or a tensor, as a list."""
    numbers = weights.tolist() if hasattr(weights, "tolist") else weights
    if not isinstance(numbers, (list, tuple)) or not all(is_number(w) and w >= 0 for w in numbers) or not any(numbers):
        raise ValueError(
            f"class_weights={weights!r} is not allowed: it must be a list or tensor of one number per class, all at "
            "least 0 and not all 0."
        )
    return [float(w) for w in numbers]


def distillation_loss(student: Tensor, teacher: Tensor, problem_type: str, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of logits [B, K], the mean over rows; multi-label: summed over labels; regression:
    squared difference. The teacher comes without gradient."""
    student, teacher = student.float(), teacher.float()
    problem = problem_of(problem_type)
    if not problem.gives_labels:
        return F.mse_loss(student, teacher)
    student, teacher = student / temperature, teacher / temperature
    if not problem.many_labels:
        kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
        return kl * temperature**2
    both = torch.stack([student, -student], dim=-1), torch.stack([teacher, -teacher], dim=-1)
    kl = F.kl_div(F.logsigmoid(both[0]), F.logsigmoid(both[1]), reduction="sum", log_target=True)
    return kl / len(student) * temperature**2
