"""Rows of a training: what a row of a loss and of a score is, a text or, where a model reads tokens, each token of it;
and their order in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

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


def holds_batches(rows: Any) -> bool:
    """Whether the items of a data set are lists of rows."""
    return hasattr(rows, "__len__") and len(rows) > 0 and isinstance(rows[0], list)


def flat_rows(rows: Any) -> list[Any]:
    """The rows of a data set, or of all of its items."""
    items = [rows[i] for i in range(len(rows))]
    return [*chain.from_iterable(items)] if holds_batches(rows) else items


class SharedLengthSampler(LengthGroupedSampler):
    """Batches of similar length, in an order that depends on seed and epoch alone.

    transformers' own sampler draws from the process's generator. Dropout draws from it too on a CPU, as often as the
    process's own batches are long, so after an epoch each process would have an order of its own, and a row would be
    taken twice or not at all.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def same_order(sampler: Any, args: TrainingArguments) -> Any:
    """`sampler`, or in its place one that gives all processes the same order."""
    if args.world_size == 1 or type(sampler) is not LengthGroupedSampler:
        return sampler
    seed = args.seed if args.data_seed is None else args.data_seed
    return SharedLengthSampler(sampler.batch_size * args.world_size, sampler.lengths, seed)
