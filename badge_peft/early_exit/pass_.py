"""`LeavingRun`: a call in which rows leave the batch, and the blocks run for those that are left."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from badge_peft.early_exit.survivors import Survivors
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.run import ExitRun, Frame

Array = np.ndarray


class LeavingRun(ExitRun):
    """Rows that have stopped go no further: at the next block only the survivors are handed on, without the padding
    that none of them needs, and when none is left the blocks return at once.

    Rows leave at the *entry* of a block, not behind the exit, so that a model may still mix the states of all rows
    between two blocks. Behind block M the full batch is put together again for the model's own head.

    Args:
        (as `ExitRun`, `exit_layers` among them)

    Attributes:
        exit_layer: [B], the block each row stopped at; -1 while it has not.
        left: How many rows have not stopped.
        survivors: The rows in the states; those that have just stopped are still among them.
        waiting: Whether rows have stopped since the states were last compacted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_blocks = self.exit_layers[-1]
        self.exit_layer = np.full(self.batch_size, -1, dtype=np.int64)
        self.left = self.batch_size
        self.survivors = Survivors(self.batch_size, self.pooling.mask)
        self.waiting = False
        self._tuple_length: int | None = None  # of what the last block that ran returned

    def read_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Lets rows stop at exit `number`, which has a row of the `frame` for each of the survivors."""
        raise NotImplementedError

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block` for the rows that have not stopped."""
        number = self._number(block)
        hidden = self._hidden(args, kwargs)
        if number == 1:
            self._check_rows(hidden)
            self.read_exit(block, 0, Frame(hidden))
        if not self.left:
            if block.tuple_length is None:
                block.tuple_length = self._tuple_length  # a new model: as the block before it
            if block.tuple_length is not None:
                return self._skip(block, number, hidden)
        elif number > block.layout.full_rows_until:
            if self.waiting:
                hidden = self._compact(block, hidden, args, kwargs)
            if not self.survivors.complete:
                args, kwargs = self.survivors.arguments(block, hidden, args, kwargs)
        result, frame = self._run(block, hidden, args, kwargs)
        self._tuple_length = len(result) if isinstance(result, tuple) else 0
        if block.tuple_length != self._tuple_length:  # setting an attribute of a module takes its time
            block.tuple_length = self._tuple_length
        if self.left:
            self.read_exit(block, number, frame)
        if number == self.num_blocks and not self.survivors.complete:
            full = self.survivors.restore(frame.output)
            return (full, *result[1:]) if isinstance(result, tuple) else full
        return result

    def _compact(self, block: BadgeBlock, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The states of the rows that go on."""
        going = np.flatnonzero(self.exit_layer[self.survivors.rows] < 0)
        round_up = int if self.compiled is None else self.compiled.round_up
        hidden, index = self.survivors.keep(going, block, hidden, args, kwargs, round_up)
        self.keep(going, index, self.survivors.length)
        return hidden

    def keep(self, going: Array, index: Tensor, length: int | None) -> None:
        """Goes on with the survivors `going` [k] (`index`: the same, where the states are), and with `length`
        positions of each (None: all): whatever has a row for each of them is cut."""
        self.pooling = self.pooling.rows(index, length)
        self.notes.rows(index)
        self.waiting = False

    def _skip(self, block: BadgeBlock, number: int, hidden: Tensor) -> Any:
        """What a block returns when nobody is left: its input, in the shape that the model expects."""
        if number == self.num_blocks and not self.survivors.complete:
            hidden = self.survivors.stand_in(hidden)
        return block.as_result(hidden)
