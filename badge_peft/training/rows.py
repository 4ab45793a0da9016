"""What a row of a loss and of a score is: a text or, where a model reads tokens, each token of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils.problem import problem_of


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
