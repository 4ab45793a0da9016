"""`Survivors`: what is left of a batch in the states, rows and positions, and the same part of a block's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.parts import CallPart, can_trim
from badge_peft.tuner.layer import BadgeBlock

Array = np.ndarray


class Survivors:
    """The rows in the states, at first all B, and how many positions they have there, at first all S.

    Whenever rows leave, the others are also cut after the last token of the longest of them: what is padding in every
    row takes part in nothing. That needs a mask [B, S], and a layout that says which arguments have positions.

    Args:
        batch_size: B.
        attention_mask: What the model was called with.

    Attributes:
        rows: [b], their places in the batch, ascending.
        length: Positions in the states; None: all S.
        part: The same rows and positions of the call; None while all of them are there.
    """

    def __init__(self, batch_size: int, attention_mask: Tensor | None) -> None:
        self.batch_size = batch_size
        self.rows: Array = np.arange(batch_size)
        self.length: int | None = None
        self.part: CallPart | None = None
        self._mask = attention_mask
        self._ends: Array | None = None  # [B], the position after each row's last token
        self._positions = 0  # S

    @property
    def complete(self) -> bool:
        """Whether all B rows and all S positions are there."""
        return self.part is None

    def keep(
        self,
        chosen: Array,
        block: BadgeBlock,
        states: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        round_up: Callable[[int], int] = int,
    ) -> tuple[Tensor, Tensor]:
        """Goes on with the `chosen` [k] of the rows in the states; `round_up` gives the length for a longest row.

        Returns:
            Their states, and `chosen` as a tensor.
        """
        if self.complete:
            self._positions = states.shape[1]
            if not can_trim(self._mask, self._positions, block, args, kwargs):
                self._mask = None
        self.rows = self.rows[chosen]
        index = torch.from_numpy(chosen).to(states.device)
        if self._mask is not None:
            longest = round_up(int(self._row_ends(self._mask)[self.rows].max()))
            if longest < states.shape[1]:
                self.length = longest
                states = states[:, :longest]
        rows = torch.from_numpy(self.rows).to(states.device)
        self.part = CallPart(rows, self.batch_size, self._positions, self.length)
        return states.index_select(0, index), index

    def placeholder(self, states: Tensor) -> Tensor:
        """[B, S, d] of no meaning, for a head whose logits are not read."""
        return states[:1, :1].expand(self.batch_size, self._positions, -1)

    def _row_ends(self, mask: Tensor) -> Array:
        if self._ends is None:
            self._ends = row_ends(mask.expand(self.batch_size, -1))  # one row may stand for all
        return self._ends


def row_ends(mask: Tensor) -> Array:
    """[B, S] -> [B], the position after each row's last token."""
    real = (mask != 0).cpu().numpy()
    # a row of padding alone looks at every position, and has them all: argmax finds nothing, and says 0
    return mask.shape[1] - real[:, ::-1].argmax(axis=1)
