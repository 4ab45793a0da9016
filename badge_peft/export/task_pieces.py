"""Pieces of a model, as `pieces.py` cuts them, with the exits of many tasks in each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from badge_peft.early_exit.readers import ExitReader, exit_reader
from badge_peft.export.pieces import BEFORE, FOLLOWING, LEFT, PiecePass
from badge_peft.export.task_groups import inner_names
from badge_peft.export.task_stacks import ExportedStack, carried, side_by_side, stacks_of
from badge_peft.model import BadgeModel
from badge_peft.tuner.context import Frame
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.saved_modules import TaskHeads


class TaskPiecePass(PiecePass):
    """As `PiecePass`, with a reader for each task that reads the exit.

    Args:
        readers: By task.
        stacks: Of the exits that are read together; None: they are made now.
        *args: Of `PiecePass`.

    Attributes:
        logits: Tasks, and the logits [T, n, K] of their exits.
        uncertainty: By task, [n] (LTE).
    """

    def __init__(self, readers: Mapping[str, ExitReader], stacks: Sequence[ExportedStack] | None, *args: Any) -> None:
        super().__init__(None, *args)
        self.readers, self.stacks = readers, stacks
        self.logits: list[tuple[list[str], Tensor]] = []
        self.uncertainty: dict[str, Tensor] = {}

    def _read_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        readers = {task: reader for task, reader in self.readers.items() if block.has_exit(task, number)}
        if not readers:
            return
        self.following = frame.output
        if self.stacks is None:
            self.stacks = stacks_of(block, number, frame, readers)
        for stack in self.stacks:
            own = [readers[task] for task in stack.tasks]
            found = stack(frame, own[0].pooling)
            self.logits.append((stack.tasks, carried(block, number, own, found)))
        stacked = {task for stack in self.stacks for task in stack.tasks}
        for task, reader in readers.items():
            if task not in stacked:
                logits, uncertainty = reader.read(block, number, frame)
                self.logits.append(([task], logits.unsqueeze(0)))
                if uncertainty is not None:
                    self.uncertainty[task] = uncertainty


class TaskPiece(nn.Module):
    """One piece of a model: as `ModelPiece`, for many tasks.

    Args:
        badge: The model, in eval mode.
        number: Of the block, 1..M; 0 is the embeddings.
        lengths: [M], from `tuple_lengths`.
        read: By group of tasks (as `TaskGroup` has them), the block numbers of the exits whose logits are wanted.
    """

    def __init__(
        self, badge: BadgeModel, number: int, lengths: list[int], read: Mapping[tuple[str, ...], Collection[int]]
    ) -> None:
        super().__init__()
        self.badge, self.number, self.lengths = badge, number, lengths
        self.inner = inner_names(read)
        self.groups = [group for group, numbers in read.items() if number in numbers]
        self.read = bool(self.groups)
        self.stacks: nn.ModuleList | None = None  # made in the first call, which must not be one that is traced

    def forward(
        self,
        inputs: dict[str, Tensor],
        hidden: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
        before: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Runs the piece; what it takes and returns is called as in `ModelPiece`, but `logits` and `uncertainty` have
        the inner name of their group's first task in front (`task0.logits`, of a group of T > 1 tasks [B, T, K]), and
        what exits leave for others that of its task (`left_task0.logits`)."""
        exits = {task: self.badge.adapter_exits(task) for group in self.groups for task in group}
        readers = {task: exit_reader(self.badge, own, inputs) for task, own in exits.items()}
        named_inside = {self.inner[task]: reader for task, reader in readers.items()}
        for name, tensor in (before or {}).items():
            inner, _, left = name.removeprefix(BEFORE).rpartition(".")
            if inner in named_inside:
                named_inside[inner].state.left[left] = tensor
        stacks: Any = self.stacks
        run = TaskPiecePass(readers, stacks, self.number, hidden, list((shared or {}).values()), self.lengths)
        at_head = self._at_the_head(exits)
        run.heads = TaskHeads(dict.fromkeys(at_head, _always), self._last_head())
        with run:
            base = self.badge.model(return_dict=True, **inputs)
        if self.stacks is None:
            self.stacks = nn.ModuleList(run.stacks or [])
        named = {} if run.following is None else {FOLLOWING: run.following}
        if self.number == 0:
            named |= {f"shared_{i}": tensor.clone() for i, tensor in enumerate(run.shared)}
        for task, logits in run.heads.logits(base.logits).items():
            run.logits.append(([task], logits[..., : exits[task].num_labels].unsqueeze(0)))
        for group in self.groups:
            labels = [exits[task].num_labels for task in group]
            named[f"{self.inner[group[0]]}.logits"] = side_by_side(run.logits, group, max(labels))
            if group[0] in run.uncertainty:
                named[f"{self.inner[group[0]]}.uncertainty"] = run.uncertainty[group[0]]
        for task, reader in readers.items():
            if task not in at_head:
                named |= {
                    f"{LEFT}{self.inner[task]}.{name}": tensor.clone() for name, tensor in reader.state.left.items()
                }
        return named

    def _at_the_head(self, exits: Mapping[str, Any]) -> Sequence[str]:
        """The tasks that the model's own head answers in this piece."""
        last = self.number == self.badge.num_blocks
        return [task for task, own in exits.items() if last and not own.has_final_exit]

    def _last_head(self) -> nn.Module | None:
        head = self.badge.layout.head
        return getattr(self.badge.model, head[-1], None) if head else None


def _always() -> bool:
    return True
