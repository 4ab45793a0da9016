"""`ExitReader`: one adapter that asks about some of the rows of a pass.

A reader has the adapter's exits, a policy, the history of its rows and their answers; it never runs a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from badge_peft.tuner.context import Frame
from badge_peft.tuner.decoders import read_mask
from badge_peft.tuner.exit_state import ExitState
from badge_peft.tuner.exits import AdapterExits
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.pooling import Pooling

Array = np.ndarray


class ExitReader:
    """Reads the exits of one adapter. Its rows lie side by side in the batch.

    Args:
        exits: Of the adapter.
        rows: How many rows it asks about, n.
        attention_mask: [n, S] or None, of these rows; [1, S] holds for all of them.
        first: The first of them in the batch.

    Attributes:
        num_active: Rows that have no answer yet.
        has_answered: Whether rows in the states have their answer, so that they might be taken out.

    Raises:
        ValueError: the exits pool over positions and the mask has none.
    """

    def __init__(self, exits: AdapterExits, rows: int, attention_mask: Tensor | None, first: int = 0) -> None:
        if attention_mask is not None and attention_mask.dim() != 2 and exits.pooling != "cls":
            raise ValueError(
                f"exit_pooling={exits.pooling!r} needs an attention_mask of shape [batch, sequence], got "
                f"{list(attention_mask.shape)}."
            )
        if attention_mask is not None and attention_mask.shape[0] == 1:
            attention_mask = attention_mask.expand(rows, *attention_mask.shape[1:])
        self.exits = exits
        self.rows = rows
        self.first = first
        self.pooling = Pooling(exits.pooling, attention_mask)
        self.state = ExitState(exits.past_future)
        self.reads_uncertainty = exits.uncertainty is not None
        self.num_active = rows
        self.has_answered = False

    def at_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Takes note of exit `number` of `block`, where the adapter has one.

        Args:
            block: The block that has just run.
            number: Its number; 0 stands for the embeddings.
            frame: What it saw, a row for each of the reader's rows in the states.
        """
        raise NotImplementedError  # by the reader of full depth, and by the one that has a policy

    def read(self, block: BadgeBlock, number: int, frame: Frame) -> tuple[Tensor, Tensor | None]:
        """Logits [n, K] of exit `number`, and the uncertainty [n] that learning to exit (LTE) predicts."""
        vector, logits = block.read_exit(self.exits, number, frame, self.pooling, self.state)
        if not self.reads_uncertainty or self.exits.uncertainty is None:
            return logits, None
        return logits, self.exits.uncertainty(vector).sigmoid().squeeze(-1)

    def is_active(self) -> Array:
        """[n] bool, of the reader's rows in the states: those that have no answer yet."""
        raise NotImplementedError  # by a reader whose rows may leave

    def keep_rows(self, kept: Array, index: Tensor, length: int | None) -> None:
        """Goes on with some of its rows in the states.

        Args:
            kept: [k], which.
            index: The same, where the states are.
            length: Positions of each row that are left; None: all.
        """
        self.pooling = self.pooling.rows(index, length)
        self.state.keep_rows(index, length)


def exit_reader(badge: Any, exits: AdapterExits, inputs: dict[str, Tensor]) -> ExitReader:
    """Who reads exits for all rows of `badge`, a `BadgeModel`, at the positions at which a call of it does."""
    mask = read_mask(badge.model, badge.layout, exits.pooling, inputs)
    return ExitReader(exits, inputs["input_ids"].shape[0], mask)
