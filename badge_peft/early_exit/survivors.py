"""`Survivors`: which rows of a batch are still in the states, and their share of a block's arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.layer import BadgeBlock

Array = np.ndarray


class Survivors:
    """The rows in the states; at first all B.

    Args:
        batch_size: B.

    Attributes:
        rows: [b], their places in the batch, ascending.
        complete: Whether they are all B.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.rows: Array = np.arange(batch_size)
        self.complete = True
        self._index: Tensor | None = None  # `rows`, where the states are
        self._cut: dict[int, tuple[Tensor, Tensor]] = {}  # arguments of the model's loop, already cut

    def keep(self, chosen: Array, states: Tensor) -> tuple[Tensor, Tensor]:
        """Goes on with the `chosen` [k] of the rows in the states.

        Returns:
            Their states, and `chosen` as a tensor.
        """
        index = torch.from_numpy(chosen).to(states.device)
        self.rows = self.rows[chosen]
        self.complete = False
        self._index = torch.from_numpy(self.rows).to(states.device)
        self._cut.clear()
        return states.index_select(0, index), index

    def arguments(
        self, block: BadgeBlock, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's arguments: the `states`, and the survivors' part of all else that has a row per input."""
        shared = block.layout.shared_arguments
        rest = {k: v if k in shared else self._part(v) for k, v in kwargs.items() if k != "hidden_states"}
        if args:
            return (states, *map(self._part, args[1:])), rest
        return (), {**rest, "hidden_states": states}

    def restore(self, states: Tensor) -> Tensor:
        """[b, S, d] -> [B, S, d], for what the model does with all rows; those that have left are zeros."""
        assert self._index is not None
        return states.new_zeros(self.batch_size, *states.shape[1:]).index_copy_(0, self._index, states)

    def _part(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._part, value))
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != self.batch_size:
            return value
        if id(value) not in self._cut:
            assert self._index is not None
            part = value.index_select(0, self._index)
            self._cut[id(value)] = (value, part)  # the first keeps the id from being reused
        return self._cut[id(value)][1]
