"""The exits of many tasks at one block as one product of stacked weights, in a graph."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badge_peft.early_exit.readers import ExitReader
from badge_peft.tuner.context import Frame
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.pooling import Pooling
from badge_peft.tuner.stacked import MISSING, StackedExits, shape_of, stackable


class ExportedStack(nn.Module):
    """Exits of like shape, whose stacked weights are buffers: those of single exits are not in the file.

    Args:
        tasks: Whose exits.
        stack: Their weights.
    """

    def __init__(self, tasks: list[str], stack: StackedExits) -> None:
        super().__init__()
        self.tasks, self.stack = tasks, stack
        self.which = tuple(range(len(tasks)))
        weights = stack.weights(self.which)  # here, so that what makes them is not in the graph
        self.names = [f"weights_{i}" for i in range(len(weights))]
        for name, value in zip(self.names, weights, strict=True):
            self.register_buffer(name, value)

    def forward(self, frame: Frame, pooling: Pooling) -> Tensor:
        """Logits [T, n, K]; of labels that an exit lacks, `MISSING`."""
        stack = copy.copy(self.stack)
        stack.parts = {self.which: tuple(self._buffers[name] for name in self.names)}
        return stack.logits(frame, pooling, self.which)


def stacks_of(block: BadgeBlock, number: int, frame: Frame, readers: Mapping[str, ExitReader]) -> list[ExportedStack]:
    """Stacks of the exits `number` of these tasks that are alike. With mean pooling, exits stay apart: all positions
    of eight tasks at once would leave the caches.

    Args:
        block: The block that has just run; 0 are the embeddings, which have no bypass.
        number: Its number.
        frame: What it saw.
        readers: By task.
    """
    alike: dict[Hashable, list[str]] = {}
    plain = {}
    for task, reader in readers.items():
        if number == 0 or reader.reads_uncertainty or reader.pooling.kind not in ("cls", "last"):
            continue
        own = stackable(block, number, frame, reader.exits)
        if own is not None:
            plain[task] = own
            alike.setdefault((reader.pooling.kind, shape_of(own)), []).append(task)
    return [
        ExportedStack(tasks, StackedExits([plain[t] for t in tasks])) for tasks in alike.values() if len(tasks) > 1
    ]


def side_by_side(found: Sequence[tuple[list[str], Tensor]], group: Sequence[str], labels: int) -> Tensor:
    """Logits [n, K] of a task, or [n, T, K] of several; of labels that a task lacks, `MISSING`.

    Args:
        found: Tasks, and their logits [T', n, K'].
        group: Names of T tasks.
        labels: K.
    """
    parts, names = [], []
    for tasks, logits in found:
        own = [i for i, task in enumerate(tasks) if task in group]
        if not own:
            continue
        names += [tasks[i] for i in own]
        whole = len(own) == len(tasks)
        part = logits if whole else logits[own[0] : own[0] + 1] if len(own) == 1 else logits[torch.tensor(own)]
        part = part[..., :labels]
        parts.append(F.pad(part, (0, labels - part.shape[-1]), value=MISSING) if part.shape[-1] < labels else part)
    if len(group) == 1:
        return parts[0].squeeze(0)
    logits = parts[0] if len(parts) == 1 else torch.cat(parts)
    if names != list(group):
        logits = logits[torch.tensor([names.index(task) for task in group])]
    return logits.transpose(0, 1)
