"""Batches of similar length: the argument that asks for them, and an order that several processes share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


def sampling(by_length: bool) -> dict[str, Any]:
    """The argument for batches of similar length, or of rows at random, as the installed transformers has it."""
    if "train_sampling_strategy" in {f.name for f in fields(TrainingArguments)}:  # transformers 5
        return {"train_sampling_strategy": "group_by_length" if by_length else "random"}
    return {"group_by_length": by_length}


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
