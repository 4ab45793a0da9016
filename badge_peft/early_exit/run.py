"""`EarlyExitRun`: a call in which rows leave at the exit that their policy chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import ExitPolicy
from badge_peft.layer import BadgeBlock
from badge_peft.run import ExitRun, Frame


class EarlyExitRun(ExitRun):
    """Rows that have stopped go no further: at the next block only the survivors are handed on, and when none is left
    the blocks return at once.

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
    """

    def __init__(self, *args: Any, policy: ExitPolicy, num_labels: int, problem_type: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy.check(self.exit_layers, num_labels, problem_type)
        self.policy = policy
        self.num_blocks = self.exit_layers[-1]
        self.history = ExitHistory(self.exit_layers, self.batch_size, num_labels, problem_type)
        self.answer: Tensor | None = None
        self.exit_layer = np.full(self.batch_size, -1, dtype=np.int64)
        self.alive: np.ndarray | None = None  # indices of the rows in the states; None: all B
        self._waiting: np.ndarray | None = None  # of those, the rows to keep at the next block
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # per-row arguments, already compacted
        self._returned_tuple: bool | None = None  # whether the last block that ran did
        self._dtype: torch.dtype | None = None  # of the exits' logits

    @property
    def finished(self) -> bool:
        """Whether every row has answered."""
        return self.answer is not None and not (self.exit_layer < 0).any()

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block` for the rows that have not stopped."""
        number = self._number(block)
        hidden = self._hidden(args, kwargs)
        if number == 1:
            self._check_rows(hidden)
            if block.has_exit(self.adapter, 0):
                self._decide(0, self._read(block, 0, Frame(hidden)))
        if self.finished and block.returns_tuple is None:
            block.returns_tuple = self._returned_tuple  # a new model: as the block before it
        if self.finished and block.returns_tuple is not None:
            return self._skip(block, number, hidden)
        if number > block.layout.full_rows_until and not self.finished:
            args, kwargs = self._drop_stopped(block, args, kwargs)
            hidden = self._hidden(args, kwargs)
        result, frame = self._run(block, hidden, args, kwargs)
        block.returns_tuple = self._returned_tuple = isinstance(result, tuple)
        if block.has_exit(self.adapter, number) and not self.finished:
            self._decide(number, self._read(block, number, frame))
        if number == self.num_blocks and self.alive is not None:
            full = self._all_rows(frame.output)
            return (full, *result[1:]) if isinstance(result, tuple) else full
        return result

    def finish(self, logits: Tensor) -> None:
        """Gives the rows that are left the answer of the model's own head, [B, K]."""
        dtype = logits.dtype if self._dtype is None else torch.promote_types(logits.dtype, self._dtype)
        if self.answer is not None:  # one precision, whoever answers
            self.answer = self.answer.to(dtype)
        left = self.exit_layer < 0
        if left.any():
            self._store(logits.to(dtype), left, np.arange(self.batch_size), self.num_blocks)

    # ------------------------------------------------------------------------------------------------------ decisions

    def _decide(self, number: int, logits: Tensor) -> None:
        """Asks the policy about exit `number`; `logits` has the rows of the current states."""
        rows = np.arange(self.batch_size) if self.alive is None else self.alive
        going = self.exit_layer[rows] < 0  # rows may have stopped and still be in the states
        host = logits.detach().float().cpu().numpy()
        doubt = self.doubts[number].float().cpu().numpy() if number in self.doubts else None
        if host.shape[0] != self.history.rows:
            host, doubt = host[going], None if doubt is None else doubt[going]
        self._dtype = logits.dtype
        self.history.append(host, doubt)
        stops = self.policy.stops(self.history, self.history.seen - 1)
        if not stops.any():
            return
        marked = np.zeros(len(rows), dtype=bool)
        marked[np.flatnonzero(going)[stops]] = True
        self._store(logits, marked, rows, number)
        self.history.keep(~stops)
        self._waiting = self.exit_layer[rows] < 0

    def _store(self, logits: Tensor, marked: np.ndarray, rows: np.ndarray, number: int) -> None:
        """Keeps `logits` of the `marked` rows as their answer."""
        if marked.all() and len(rows) == self.batch_size:
            self.answer = logits
        else:
            if self.answer is None:
                self.answer = logits.new_zeros(self.batch_size, logits.shape[-1])
            source = torch.from_numpy(np.flatnonzero(marked)).to(logits.device)
            target = torch.from_numpy(rows[marked]).to(self.answer.device)
            self.answer[target] = logits.index_select(0, source).to(self.answer)
        self.exit_layer[rows[marked]] = number

    # ------------------------------------------------------------------------------------------------------ compaction

    def _drop_stopped(
        self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's arguments for the rows that go on: the states, and everything that has a row per input."""
        hidden = self._hidden(args, kwargs)
        if self._waiting is not None:
            keep = torch.from_numpy(np.flatnonzero(self._waiting)).to(hidden.device)
            hidden = hidden.index_select(0, keep)
            rows = np.arange(self.batch_size) if self.alive is None else self.alive
            self.alive = rows[self._waiting]
            self.pooling = self.pooling.rows(keep)
            self.notes.rows(keep)
            self._waiting = None
            self._kept.clear()
        if self.alive is None:
            return args, kwargs
        index = torch.from_numpy(self.alive).to(hidden.device)
        shared = block.layout.shared_arguments
        rest = {k: v if k in shared else self._rows(v, index) for k, v in kwargs.items() if k != "hidden_states"}
        if args:
            return (hidden, *(self._rows(v, index) for v in args[1:])), rest
        return (), {**rest, "hidden_states": hidden}

    def _rows(self, value: Any, index: Tensor) -> Any:
        """`value` for the rows `index`, where it is a tensor (or a tuple of tensors) with a row per input."""
        if isinstance(value, tuple):
            return tuple(self._rows(v, index) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != self.batch_size:
            return value
        if id(value) not in self._kept:
            self._kept[id(value)] = (value, value.index_select(0, index))  # the first keeps the id from being reused
        return self._kept[id(value)][1]

    def _skip(self, block: BadgeBlock, number: int, hidden: Tensor) -> Any:
        """What a block returns when nobody is left: its input, in the shape that the model expects."""
        if number == self.num_blocks and hidden.shape[0] != self.batch_size:
            hidden = hidden[:1].expand(self.batch_size, -1, -1)
        return (hidden, None) if block.returns_tuple else hidden

    def _all_rows(self, states: Tensor) -> Tensor:
        """Puts the survivors' states back at their places among all B rows."""
        full = states.new_zeros(self.batch_size, *states.shape[1:])
        full[torch.from_numpy(self.alive).to(states.device)] = states
        return full
