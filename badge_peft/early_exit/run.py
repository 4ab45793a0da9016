"""`EarlyExitRun`: a call in which rows leave at the exit that their policy chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import ExitPolicy
from badge_peft.early_exit.survivors import Survivors
from badge_peft.heads import Exit
from badge_peft.layer import BadgeBlock
from badge_peft.run import ExitRun, Frame

Array = np.ndarray


class EarlyExitRun(ExitRun):
    """Rows that have stopped go no further: at the next block only the survivors are handed on, without the padding
    that none of them needs, and when none is left the blocks return at once. Exits whose logits no decision can depend
    on are not computed.

    Rows leave at the *entry* of a block, not behind the exit, so that a model may still mix the states of all rows
    between two blocks. Behind block M the full batch is put together again for the model's own head.

    Args:
        policy: Decides, on the host.
        num_labels: K.
        problem_type: For the policy.
        (the others as `ExitRun`, `exit_layers` among them)

    Attributes:
        answer: [B, K], logits of the rows that have stopped.
        exit_layer: [B], the block each row stopped at; -1 while it has not.
        left: How many rows have not stopped.
    """

    def __init__(self, *args: Any, policy: ExitPolicy, num_labels: int, problem_type: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy.check(self.exit_layers, num_labels, problem_type)
        self.policy = policy
        self.num_blocks = self.exit_layers[-1]
        self.history = ExitHistory(self.exit_layers, self.batch_size, num_labels, problem_type)
        self.answer: Tensor | None = None
        self.exit_layer = np.full(self.batch_size, -1, dtype=np.int64)
        self.left = self.batch_size
        self.survivors = Survivors(self.batch_size, self.pooling.mask)
        if not policy.reads_doubts:
            self.learn_to_exit = None
        self._position = 0  # of the next exit among all exits
        self._undecided: list[list[Tensor] | None] = []  # exits since the last decision; None: one not computed
        self._waiting = False  # whether rows have stopped since the states were last compacted
        self._tuple_length: int | None = None  # of the last block that ran
        self._dtype: torch.dtype | None = None  # of the exits' logits

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block` for the rows that have not stopped."""
        number = self._number(block)
        hidden = self._hidden(args, kwargs)
        if number == 1:
            self._check_rows(hidden)
            self._exit(block, 0, Frame(hidden))
        if not self.left:
            if block.tuple_length is None:
                block.tuple_length = self._tuple_length  # a new model: as the block before it
            if block.tuple_length is not None:
                return self._skip(block, number, hidden)
        elif number > block.layout.full_rows_until:
            if self._waiting:
                hidden = self._compact(block, hidden, args, kwargs)
            if not self.survivors.complete:
                args, kwargs = self.survivors.arguments(block, hidden, args, kwargs)
        result, frame = self._run(block, hidden, args, kwargs)
        self._tuple_length = len(result) if isinstance(result, tuple) else 0
        if block.tuple_length != self._tuple_length:  # setting an attribute of a module takes its time
            block.tuple_length = self._tuple_length
        if self.left:
            self._exit(block, number, frame)
        if number == self.num_blocks and not self.survivors.complete:
            full = self.survivors.restore(frame.output)
            return (full, *result[1:]) if isinstance(result, tuple) else full
        return result

    def finish(self, logits: Tensor) -> None:
        """Gives the rows that are left the answer of the model's own head, [B, K]."""
        dtype = logits.dtype if self._dtype is None else torch.promote_types(logits.dtype, self._dtype)
        if self.answer is not None:  # one precision, whoever answers
            self.answer = self.answer.to(dtype)
        if self.left:
            rows = np.flatnonzero(self.exit_layer < 0)
            if len(rows) == self.batch_size:
                self.answer, self.left = logits.to(dtype), 0
                self.exit_layer[:] = self.num_blocks
            else:
                self._store(_take(logits, rows).to(dtype), rows, self.num_blocks)

    # ------------------------------------------------------------------------------------------------------ decisions

    def _exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Reads exit `number` of `block`, where there is one and somebody asks for it, and lets rows stop there."""
        if not block.has_exit(self.adapter, number):
            return
        exits, j = self.exit_layers, self._position
        self._position += 1
        exit_ = block.own_exit(self.adapter, number)
        if not (self.policy.reads(exits, j) or exit_.feeds_later_exits):
            self._dtype = self._dtype or logits_dtype(exit_)
            self._undecided.append(None)
            return
        logits = self._read(block, number, frame)  # a row for each that is in the states
        self._dtype = logits.dtype
        going = None  # which of these have not stopped; None: all
        if self._waiting:
            going = np.flatnonzero(self.exit_layer[self.survivors.rows] < 0)
        if self.policy.answers(exits, j):
            self._stop(logits, going, np.ones(self.left, dtype=bool), number)
            return
        found = [logits, self.doubts[number]] if number in self.doubts else [logits]
        self._undecided.append(found if going is None else [_take(x, going) for x in found])
        if self.policy.decides(exits, j):
            self._bring_up_to_date()
            stops = self.policy.stops(self.history, j)
            if np.count_nonzero(stops):
                self._stop(logits, going, stops, number)
                if self.left:
                    self.history.keep(~stops)

    def _bring_up_to_date(self) -> None:
        """Puts the exits since the last decision into the history: one transfer for all of them, as each waits for
        the device. No row has left in between."""
        computed = [entry for entry in self._undecided if entry is not None]
        host = zip(*map(on_host, zip(*computed, strict=True)), strict=True)  # for each exit its logits, and its doubts
        for entry in self._undecided:
            if entry is None:
                self.history.skip()
            else:
                self.history.append(*next(host))
        self._undecided.clear()

    def _stop(self, logits: Tensor, going: Array | None, stops: Array, number: int) -> None:
        """Of the rows in the states those `going`, and of these the ones that `stops` marks, stop at exit `number`."""
        places = np.flatnonzero(stops) if going is None else going[stops]
        if len(places) == self.batch_size:
            self.answer, self.left = logits, 0
            self.exit_layer[:] = number
            return
        self._store(_take(logits, places), self.survivors.rows[places], number)
        self._waiting = True

    def _store(self, logits: Tensor, rows: Array, number: int) -> None:
        """Keeps `logits`, whose rows are the `rows` of the batch, as their answer."""
        if self.answer is None:
            self.answer = logits.new_zeros(self.batch_size, logits.shape[-1])
        self.answer[torch.from_numpy(rows).to(self.answer.device)] = logits.to(self.answer)
        self.exit_layer[rows] = number
        self.left -= len(rows)

    # ----------------------------------------------------------------------------------------------------- compaction

    def _compact(self, block: BadgeBlock, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The states of the rows that go on."""
        going = np.flatnonzero(self.exit_layer[self.survivors.rows] < 0)
        round_up = int if self.compiled is None else self.compiled.round_up
        hidden, index = self.survivors.keep(going, block, hidden, args, kwargs, round_up)
        self.pooling = self.pooling.rows(index, self.survivors.length)
        self.notes.rows(index)
        self._waiting = False
        return hidden

    def _skip(self, block: BadgeBlock, number: int, hidden: Tensor) -> Any:
        """What a block returns when nobody is left: its input, in the shape that the model expects."""
        if number == self.num_blocks and not self.survivors.complete:
            hidden = self.survivors.stand_in(hidden)
        return block.as_result(hidden)


def logits_dtype(exit_: Exit) -> torch.dtype:
    """The precision in which an exit would answer."""
    device = exit_.linear.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else exit_.linear.weight.dtype


def on_host(values: Sequence[Tensor]) -> list[Array]:
    """Equal shapes in, float32 arrays in numpy out."""
    if values[0].is_cpu:
        return [x.numpy() if x.dtype is torch.float32 else x.float().numpy() for x in values]
    return list(torch.stack([x.float() for x in values]).cpu().numpy())


def _take(values: Tensor, rows: Array) -> Tensor:
    return values.index_select(0, torch.from_numpy(rows).to(values.device))
