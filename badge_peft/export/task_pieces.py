"""Pieces of a model, as `pieces.py` cuts them, with the exits of many tasks in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from badge_peft.early_exit.readers import ExitReader
from badge_peft.export.pieces import FOLLOWING, PiecePass
from badge_peft.model import BadgeModel
from badge_peft.tuner.context import Frame
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.saved_modules import TaskHeads


class TaskPiecePass(PiecePass):
    """As `PiecePass`, with a reader for each task that reads the exit.

    Attributes:
        answers: By task, logits [B, K] of the exit, and the uncertainty [B] (LTE).
    """

    def __init__(self, readers: Mapping[str, ExitReader], *args: Any) -> None:
        super().__init__(None, *args)
        self.readers = readers
        self.answers: dict[str, tuple[Tensor, Tensor | None]] = {}

    def _read_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        for task, reader in self.readers.items():
            if block.has_exit(task, number):
                self.following = frame.output
                self.answers[task] = reader.read(block, number, frame)


class TaskPiece(nn.Module):
    """One piece of a model: as `ModelPiece`, for many tasks.

    Args:
        badge: The model, in eval mode.
        number: Of the block, 1..M; 0 is the embeddings.
        lengths: [M], from `tuple_lengths`.
        read: By task, the block numbers of the exits whose logits are wanted.
    """

    def __init__(self, badge: BadgeModel, number: int, lengths: list[int], read: Mapping[str, set[int]]) -> None:
        super().__init__()
        self.badge, self.number, self.lengths = badge, number, lengths
        self.tasks = [task for task, numbers in read.items() if number in numbers]
        self.read = bool(self.tasks)

    def forward(
        self, inputs: dict[str, Tensor], hidden: Tensor | None = None, shared: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Runs the piece; what it returns is called as in `ModelPiece`, but `logits` and `uncertainty`, which have the
        name of their task in front: `intent.logits`."""
        exits = {task: self.badge.adapter_exits(task) for task in self.tasks}
        rows, mask = inputs["input_ids"].shape[0], inputs["attention_mask"]
        readers = {task: ExitReader(own, rows, mask) for task, own in exits.items()}
        run = TaskPiecePass(readers, self.number, hidden, list((shared or {}).values()), self.lengths)
        run.heads = TaskHeads(dict.fromkeys(self._at_the_head(exits), _always), self._last_head())
        with run:
            base = self.badge.model(return_dict=True, **inputs)
        named = {} if run.following is None else {FOLLOWING: run.following}
        if self.number == 0:
            named |= {f"shared_{i}": tensor.clone() for i, tensor in enumerate(run.shared)}
        heads = run.heads.logits(base.logits)
        for task in self.tasks:
            logits, uncertainty = run.answers.get(task) or (heads[task][..., : exits[task].num_labels], None)
            named[f"{task}.logits"] = logits
            if uncertainty is not None:
                named[f"{task}.uncertainty"] = uncertainty
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
