"""`SlicedPass`: all candidates of a query in one call of the model, whose blocks run for a few of them at a time.

The bar of an exit is that of the whole query, so no candidate may go past an exit before all have come to it. Here the
slices wait for one another: the model embeds all candidates in one batch and runs its own loop once, and at each of
its blocks slice by slice runs, of candidates of similar length, without the padding that none of the slice needs.
Behind each exit those that are left are put together anew, so that slices stay full. What the loop hands from block to
block is a placeholder; the states are here, and are given back to it behind the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.early_exit.exit_pass import AllRowsAnswered, EarlyExitPass, check_rows
from badge_peft.early_exit.readers import ExitReader, PolicyReader
from badge_peft.early_exit.row_slice import RowSlice, can_trim
from badge_peft.tuner.context import Frame, as_result, get_hidden_states
from badge_peft.tuner.layer import BadgeBlock

Array = np.ndarray

#: What a call of a block costs beside its positions, in positions: below that, padding is cheaper than another slice.
_CALL_ON_CPU, _CALL_ON_GPU = 32, 8192


class StatesChanged(Exception):
    """The model does something with the states between two blocks, so it has to see them."""


@dataclass(eq=False)
class Slice:
    """Candidates that are in a block together, with the output [b, L, d] of the last block that ran."""

    states: Tensor
    part: RowSlice
    reader: ExitReader

    def __len__(self) -> int:
        return len(self.part.index)


class SlicedPass(EarlyExitPass):
    """The blocks of one call for all candidates of a query, the longest first, at most `most` in a block at once.
    `StatesChanged` inside of a call says that its rows have to be run in another way."""

    def __init__(
        self, reader: PolicyReader, lengths: Array, attention_mask: Tensor, most: int, num_blocks: int
    ) -> None:
        super().__init__([reader], len(lengths), attention_mask, num_blocks)
        self.reader, self.lengths, self.mask, self.most = reader, lengths, attention_mask, most
        self.slices: list[Slice] = []
        self._handed: Tensor | None = None  # what the block before has returned
        self._tuple_length = 0  # of what blocks return

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block` for the rows that are still needed, slice by slice, and has its exits read."""
        number, hidden = self.number_of(block), get_hidden_states(args, kwargs)
        mixed = number <= block.layout.full_rows_until
        if number == 1:
            check_rows(hidden, self.batch_size)
            if not can_trim(self.mask, hidden.shape[1], block, args, kwargs):
                self.lengths = np.full_like(self.lengths, hidden.shape[1])
            self._cut(hidden)
            self._read(block, 0, ((each, Frame(each.states)) for each in self.slices))
        elif hidden is not self._handed:
            if number > block.layout.full_rows_until + 1:
                raise StatesChanged
            for each in self.slices:  # no row has left yet
                each.states = hidden[:, : each.states.shape[1]].index_select(0, each.part.index)
        if self.reader.num_active:
            if self.reader.has_answered and not mixed:
                self._regroup()
        elif self._may_end:
            raise AllRowsAnswered
        self._read(block, number, self._run(block, args, kwargs))
        if number != self.num_blocks and not mixed:
            return self._hand_on(hidden)
        full = self.slices[0].states.new_zeros(hidden.shape)
        for each in self.slices:
            each.part.scatter(each.states, full)
        return self._hand_on(full)

    def _run(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Slice, Frame]]:
        for each in self.slices:
            result, frame = self.run_block(block, *each.part.arguments(block, each.states, args, kwargs))
            self._tuple_length = len(result) if isinstance(result, tuple) else 0
            each.states = frame.output
            yield each, frame

    def _read(self, block: BadgeBlock, number: int, frames: Iterator[tuple[Slice, Frame]]) -> None:
        """Has exit `number` read slice by slice, where a decision may depend on it, and decides on all of them."""
        asked = self.reader.num_active > 0 and self.reader.needs_exit(block, number)
        logits = [each.reader.read(block, number, frame)[0] if asked else frame.output for each, frame in frames]
        if asked:
            self.reader.update(number, torch.cat(logits), None)

    def _hand_on(self, states: Tensor) -> Any:
        """What a block returns: `states` [B, S, d]."""
        self._handed = states
        return as_result(states, self._tuple_length)

    # ------------------------------------------------------------------------------------------------------- slices

    def _cut(self, hidden: Tensor) -> None:
        """Slices of all rows of `hidden` [B, S, d]."""
        rows = np.arange(len(self.lengths))
        for start, end in self._bounds(rows):
            part = self._part(rows[start:end], hidden)
            states = hidden[:, : part.length].index_select(0, part.index)
            self.slices.append(Slice(states, part, self._reader_of(part)))

    def _regroup(self) -> None:
        """New slices of the rows that have no answer yet."""
        kept = np.flatnonzero(self.reader.is_active())
        before = self.slices
        device = before[0].states.device
        self.reader.keep_rows(kept, torch.from_numpy(kept).to(device), None)
        rows = np.concatenate([each.part.index.cpu().numpy() for each in before])[kept]
        owners = np.repeat(np.arange(len(before)), [len(each) for each in before])[kept]
        places = np.concatenate([np.arange(len(each)) for each in before])[kept]
        self.slices = []
        for start, end in self._bounds(rows):
            part, own = self._part(rows[start:end], before[0].states), slice(start, end)
            whose = owners[own], places[own]
            states = _gather([each.states for each in before], *whose, part)
            reader = self._reader_of(part)
            for name in before[0].reader.state.left:
                reader.state.left[name] = _gather([each.reader.state.left[name] for each in before], *whose, part)
            self.slices.append(Slice(states, part, reader))

    def _bounds(self, rows: Array) -> list[tuple[int, int]]:
        device = self.mask.device.type
        return slice_bounds(self.lengths[rows], self.most, _CALL_ON_CPU if device == "cpu" else _CALL_ON_GPU)

    def _part(self, rows: Array, like: Tensor) -> RowSlice:
        index = torch.from_numpy(rows).to(like.device)
        return RowSlice(index, self.batch_size, self.mask.shape[1], int(self.lengths[rows[0]]))

    def _reader_of(self, part: RowSlice) -> ExitReader:
        mask = self.mask.index_select(0, part.index)[:, : part.length]
        reader = ExitReader(self.reader.exits, len(mask), mask)
        reader.reads_uncertainty = False
        return reader


def slice_bounds(lengths: Array, most: int, call: int) -> list[tuple[int, int]]:
    """Where slices of at most `most` rows begin and end, the longest first, so that padded positions and calls, each
    as dear as `call` positions, together cost least."""
    n = len(lengths)
    least, begins = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)  # cost and last slice of the first rows
    for end in range(1, n + 1):
        first = np.arange(max(0, end - most), end)
        costs = least[first] + (end - first) * lengths[first] + call
        best = int(costs.argmin())
        least[end], begins[end] = costs[best], first[best]
    bounds, end = [], n
    while end:
        bounds.append((int(begins[end]), end))
        end = int(begins[end])
    return bounds[::-1]


def _gather(values: list[Tensor], owners: Array, places: Array, part: RowSlice) -> Tensor:
    """[b, L, ...] or [b, ...]: rows that lie at `places` in the values of their `owners`, ascending; what has
    positions is cut at `part`'s length, or filled up to it."""
    found = []
    for owner in np.unique(owners):
        value = values[owner]
        index = torch.from_numpy(places[owners == owner]).to(value.device)
        if value.dim() > 2:
            value = value[:, : part.length]
        value = value.index_select(0, index)
        if value.dim() > 2 and part.length is not None and value.shape[1] < part.length:
            value = F.pad(value, (0, 0, 0, part.length - value.shape[1]))
        found.append(value)
    return torch.cat(found) if len(found) > 1 else found[0]
