"""What is left of a batch: `RowSlice`, the arguments of a block for some of its rows and their first positions, and
`ActiveRows`, which says which these are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.arguments import positional
from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.layer import BadgeBlock

Array = np.ndarray


class RowSlice:
    """The arguments with which a block runs for the rows `index` [b] of B, and the first `length` (None: all) of S
    positions."""

    def __init__(self, index: Tensor, batch_size: int, positions: int, length: int | None) -> None:
        self.index = index
        self.batch_size = batch_size
        self.positions = positions
        self.length = length
        self._cut: dict[int, tuple[Tensor, Tensor]] = {}  # arguments of the model's loop, already cut

    def arguments(
        self, block: BadgeBlock, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's arguments: the `states`, and this part of all else that has rows or positions."""
        layout = block.layout
        rest = {k: self._part(layout, k, v) for k, v in kwargs.items() if k != "hidden_states"}
        if args:
            return (states, *(self._part(layout, name, v) for name, v in _named(block, args))), rest
        return (), {**rest, "hidden_states": states}

    def restore(self, states: Tensor) -> Tensor:
        """[b, s, d] -> [B, S, d], for what the model does with all rows; the other rows are zeros."""
        full = states.new_zeros(self.batch_size, self.positions, states.shape[2])
        self.scatter(states, full)
        return full

    def scatter(self, states: Tensor, full: Tensor) -> None:
        """Writes states [b, s, d] to their places in `full` [B, S, d]."""
        full[:, : states.shape[1]].index_copy_(0, self.index.to(full.device), states)

    def _part(self, layout: BlockLayout, name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._part(layout, name, v) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if id(value) not in self._cut:
            part = value
            if self.length is not None:
                for dim in _position_dims(layout, name, value):
                    if value.shape[dim] == self.positions:  # a mask may have 1 there, for all positions
                        part = part.narrow(dim, 0, self.length)
            if name not in layout.shared_arguments and value.shape[0] == self.batch_size:
                part = part.index_select(0, self.index.to(value.device))
            self._cut[id(value)] = (value, part)  # the first keeps the id from being reused
        return self._cut[id(value)][1]


class ActiveRows:
    """The rows in the states, at first all B, and how many positions they have there, at first all S.

    Whenever rows leave, the others are also cut after the last token of the longest of them: what is padding in every
    row takes part in nothing. That needs a mask [B, S], and a layout that says which arguments have positions.
    `round_up` gives the length to which rows of a length are cut.
    """

    def __init__(self, batch_size: int, attention_mask: Tensor | None, round_up: Callable[[int], int] = int) -> None:
        self.batch_size = batch_size
        self.rows: Array = np.arange(batch_size)  # [b], their places in the batch, ascending
        self.length: int | None = None  # of positions in the states; None: all S
        self.part: RowSlice | None = None  # the same of the call; None while all rows are there
        self._round_up = round_up
        self._mask = attention_mask
        self._ends: Array | None = None  # [B], the position after each row's last token
        self._positions = 0  # S

    def keep(
        self, chosen: Array, block: BadgeBlock, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Goes on with the `chosen` [k] of the rows in the states: these, and `chosen` as a tensor."""
        if self.part is None:
            self._positions = states.shape[1]
            if not can_trim(self._mask, self._positions, block, args, kwargs):
                self._mask = None
        self.rows = self.rows[chosen]
        index = torch.from_numpy(chosen).to(states.device)
        if self._mask is not None:
            if self._ends is None:
                self._ends = row_ends(self._mask.expand(self.batch_size, -1))  # one row may stand for all
            longest = self._round_up(int(self._ends[self.rows].max()))
            if longest < states.shape[1]:
                self.length = longest
                states = states[:, :longest]
        rows = torch.from_numpy(self.rows).to(states.device)
        self.part = RowSlice(rows, self.batch_size, self._positions, self.length)
        return states.index_select(0, index), index


def row_ends(mask: Tensor) -> Array:
    """[B, S] -> [B], the position after each row's last token."""
    real = (mask != 0).cpu().numpy()
    # a row of padding alone looks at every position, and has them all: argmax finds nothing, and says 0
    return mask.shape[1] - real[:, ::-1].argmax(axis=1)


def can_trim(
    mask: Tensor | None, positions: int, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether padding can be cut: there is a mask [B, S], and the layout accounts for every argument that may have
    positions."""
    layout = block.layout
    if mask is None or mask.dim() != 2 or not layout.mask_arguments or mask.shape[1] != positions:
        return False
    given = [*_named(block, args), *kwargs.items()]
    known = {*layout.mask_arguments, *layout.position_arguments, *layout.shared_arguments, "hidden_states"}
    others = (tensor for name, value in given if name not in known for tensor in _tensors(value))
    return not any(positions in tensor.shape[1:] for tensor in others)


def _position_dims(layout: BlockLayout, name: str, value: Tensor) -> list[int]:
    """The dimensions of an argument that may be positions; the first never is."""
    if name in layout.mask_arguments:
        return [dim for dim in (value.dim() - 2, value.dim() - 1) if dim > 0]
    return [1] if name in layout.position_arguments else []


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _named(block: BadgeBlock, args: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """The positional arguments after the states with their names; '' where a forward only passes them on."""
    names = (*positional(type(block.base_layer).forward), *("" for _ in args))
    return list(zip(names[1:], args[1:], strict=False))
