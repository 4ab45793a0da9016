"""`EarlyExitPass`: one call of the model, whose blocks run for the rows that are still needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn

from badge_peft.early_exit.survivors import Survivors
from badge_peft.tuner.block_pass import BlockPass, states_of
from badge_peft.tuner.context import Frame
from badge_peft.tuner.layer import BadgeBlock

#: Block 1 of a model -> length of the tuple that it returns, 0 for a tensor: for passes in which no block runs at all,
#: as every row stops at exit 0. It differs between models and releases of transformers, so it is read off a call.
_TUPLE_LENGTHS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class EarlyExitPass(BlockPass):
    """The blocks of one call, and the readers that ask about its rows. A pass knows no policy.

    A row leaves when every reader that asks about it has its answer: at the next block only the other rows are handed
    on, without the padding that none of them needs, and when none is left the blocks return at once. Rows leave at the
    *entry* of a block, not at the exit, so that a model may still mix the states of all rows between two blocks. After
    block M the full batch is put together again for the model's own head. At full depth no row leaves.

    Args:
        readers: `ExitReader`s; each asks about some of the rows, and several may ask about the same.
        batch_size: B.
        attention_mask: [B, S] or None: positions behind the last one that is not 0 may be cut off.
        num_blocks: M.
        **kwargs: As for `BlockPass`.
    """

    def __init__(
        self,
        readers: Sequence[Any],
        batch_size: int,
        attention_mask: Tensor | None,
        num_blocks: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.readers = list(readers)
        self.batch_size = batch_size
        self.num_blocks = num_blocks
        self.survivors = Survivors(batch_size, attention_mask)
        self._spans = [(reader.first, reader.first + reader.rows) for reader in readers]  # in the states
        self._has_active = True
        self._tuple_length: int | None = None  # of what the last block that ran returned

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block` for the rows that are still needed, and has its exits read."""
        number = self.number_of(block)
        hidden = states_of(args, kwargs)
        if number == 1:
            self._check_rows(hidden)
            self.read(block, 0, hidden, Frame(hidden))
        if not self._has_active:
            length = self._length_known(block, number)
            if length is not None:
                return self._skip(number, hidden, length)
        elif number > block.layout.full_rows_until:
            if any(reader.has_answered for reader in self.readers):
                hidden = self._compact(block, hidden, args, kwargs)
            if self.survivors.part is not None:
                args, kwargs = self.survivors.part.arguments(block, hidden, args, kwargs)
        result, frame = self.run_block(block, *self.before_block(number, args, kwargs))
        self._note_length(block, number, result)
        self.read(block, number, hidden, frame)
        if number == self.num_blocks and self.survivors.part is not None:
            full = self.survivors.part.restore(frame.output)
            return (full, *result[1:]) if isinstance(result, tuple) else full
        return result

    def before_block(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `number` is called with; training objectives may change it."""
        return args, kwargs

    def before_exit(self, number: int, block_input: Tensor, frame: Frame) -> Frame:
        """What exit `number` reads; training objectives may change it."""
        return frame

    def training_outputs(self) -> dict[str, Tensor]:
        """Further fields of `MultiExitOutput` that a training objective reads, with a row for each of the batch."""
        return {}

    def read(self, block: BadgeBlock, number: int, block_input: Tensor, frame: Frame) -> None:
        """Hands exit `number` of `block` to the readers that still ask."""
        frame = self.before_exit(number, block_input, frame)
        rows = len(self.survivors.rows)
        active = False
        for reader, (start, end) in zip(self.readers, self._spans, strict=True):
            if reader.num_active:
                reader.at_exit(block, number, frame if end - start == rows else frame.rows(start, end))
                active = active or reader.num_active > 0
        self._has_active = active

    def _compact(self, block: BadgeBlock, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The states of the rows that some reader still asks about."""
        needed = np.zeros(len(self.survivors.rows), dtype=bool)
        for reader, (start, end) in zip(self.readers, self._spans, strict=True):
            needed[start:end] |= reader.is_active()
        kept = np.flatnonzero(needed)
        if len(kept) == len(needed):
            return hidden
        round_up = int if self.compiled is None else self.compiled.round_up
        hidden, index = self.survivors.keep(kept, block, hidden, args, kwargs, round_up)
        spans = []
        for reader, (start, end) in zip(self.readers, self._spans, strict=True):
            first, last = np.searchsorted(kept, (start, end))
            reader.keep_rows(kept[first:last] - start, index[first:last] - start, self.survivors.length)
            spans.append((int(first), int(last)))
        self._spans = spans
        return hidden

    def _skip(self, number: int, hidden: Tensor, tuple_length: int) -> Any:
        """What a block returns when no row is needed any more: its input, in the shape that the model expects."""
        if number == self.num_blocks and not self.survivors.complete:
            hidden = self.survivors.placeholder(hidden)
        return as_result(hidden, tuple_length)

    def _note_length(self, block: BadgeBlock, number: int, result: Any) -> None:
        self._tuple_length = len(result) if isinstance(result, tuple) else 0
        if number == 1 and _TUPLE_LENGTHS.get(block.base_layer) != self._tuple_length:
            _TUPLE_LENGTHS[block.base_layer] = self._tuple_length

    def _length_known(self, block: BadgeBlock, number: int) -> int | None:
        """Length of the tuple that a block returns, as far as any block has run."""
        if number == 1:
            self._tuple_length = _TUPLE_LENGTHS.get(block.base_layer)
        return self._tuple_length

    def _check_rows(self, hidden: Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[0] != self.batch_size:
            raise ValueError(
                f"block 1 got states of shape {list(hidden.shape)} for a batch of {self.batch_size}: the attention "
                "implementation has unpadded the batch into one row, and rows could not stop one by one. Load the "
                "model with attn_implementation='sdpa' (or 'eager')."
            )


def as_result(hidden: Tensor, tuple_length: int) -> Any:
    """`hidden` in the shape in which a block returns its states: a tuple of this length, 0 for the tensor itself."""
    return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden
