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
    """What the loss reads of a batch. Tokens of padding are no rows.

    Args:
        exit_logits: [B, E, K], of tokens [B, E, S, K].
        uncertainties: Of exits that learn them: [B, E], of tokens [B, E, S].
        labels: [B, ...], of tokens [B, S]; or None.
        mask: attention_mask [B, S], or None.
        config: Of the adapter.

    Returns:
        The logits of each exit [n, K], labels and the uncertainties [n, E], where there are any.
    """
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
    """What an evaluation scores: the rows that have a label.

    Args:
        exit_logits: [N, E, K], of tokens [N, S, E, K].
        label_ids: [N, ...], of tokens [N, S].
        exits: Block numbers of the exits.
        config: Of the adapter.
        names: Of the labels; tags make entities of tokens.
    """
    problem, labels = problem_of(config.resolved_problem_type), torch.from_numpy(np.asarray(label_ids))
    if not config.reads_tokens:
        counts = problem.has_label(labels)
        return ExitLogits(torch.from_numpy(exit_logits)[counts], labels[counts], exits, problem.name)
    texts = torch.arange(len(labels)).unsqueeze(1).expand_as(labels).flatten()
    logits, labels = torch.from_numpy(exit_logits).flatten(0, 1), labels.flatten()
    counts = problem.has_label(labels)
    return ExitLogits(logits[counts], labels[counts], exits, problem.name, texts=texts[counts], label_names=names)
