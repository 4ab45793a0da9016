"""`PolicyReader`: each row stops at the exit that a policy chooses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import ExitPolicy
from badge_peft.early_exit.policies.schedule import Schedule, schedule_of
from badge_peft.early_exit.readers import Array, ExitReader
from badge_peft.outputs import EarlyExitOutput
from badge_peft.tuner.context import Frame
from badge_peft.tuner.exits import AdapterExits, Exit
from badge_peft.tuner.layer import BadgeBlock


class PolicyReader(ExitReader):
    """Each row stops at the exit that the policy chooses. Exits on whose logits no decision depends are not computed.

    What stops is a *unit*: here a row, in a `TokenReader` a token.

    Args:
        exits: Of the adapter.
        rows: n.
        attention_mask: [n, S] or None.
        first: The first row in the batch.
        policy: Decides, on the host.
        groups: [n], a number for each row, the same for the candidates of a query; None: all rows are one group.

    Attributes:
        answer: [n, K], logits of the rows that have stopped.
        exit_layer: [n], the block each row stopped at; -1 while it has not.
        non_finite: [n] bool, the rows of which a decision has seen logits that are NaN or infinite.
    """

    def __init__(
        self,
        exits: AdapterExits,
        rows: int,
        attention_mask: Tensor | None,
        first: int,
        policy: ExitPolicy,
        groups: Array | None = None,
    ) -> None:
        super().__init__(exits, rows, attention_mask, first)
        policy.check(exits.numbers, exits.num_labels, exits.problem_type)
        self.policy = policy
        self.schedule = schedule_of(policy, exits.numbers)
        self.history = ExitHistory(exits.numbers, rows, exits.num_labels, exits.problem_type, groups)
        self.answer: Tensor | None = None
        self.exit_layer: Array = np.full(rows, -1, dtype=np.int64)
        self.non_finite: Array = np.zeros(rows, dtype=bool)
        self.reads_uncertainty = policy.reads_uncertainty
        self._own = frozenset(exits.numbers[: None if exits.has_final_exit else -1])  # others are the model's own head
        self._places: Array = np.arange(rows)  # of the rows in the states among all rows
        self._position = 0  # of the next exit among all exits
        self._undecided: list[list[Tensor] | None] = []  # exits since the last decision; None: one not computed
        self._dtype: torch.dtype | None = None  # of the exits' logits
        self._linked = linked_exits(self.schedule, exits)

    @property
    def reads_exits(self) -> bool:
        """Whether any exit of its own is computed; else the model's own head answers every row."""
        read = (m for m, needed in zip(self.exits.numbers, self.schedule.needed, strict=True) if needed)
        return bool(self._linked) or not self._own.isdisjoint(read)

    def finish(self, logits: Tensor) -> None:
        """Gives the rows that are active the answer of the model's own head, [n, K]."""
        dtype = logits.dtype if self._dtype is None else torch.promote_types(logits.dtype, self._dtype)
        if self.answer is not None:  # one precision, whichever exit answers
            self.answer = self.answer.to(dtype)
        if self.num_active:
            rows = np.flatnonzero(self.exit_layer < 0)
            if len(rows) == len(self.exit_layer):
                self._answer_all(logits.to(dtype), self.exits.numbers[-1])
            else:
                self._store(_take(logits, rows).to(dtype), rows, self.exits.numbers[-1])

    def output(self) -> EarlyExitOutput:
        """The answers, once every row has its own; `non_finite` has the rows whose answer is, too."""
        assert self.answer is not None
        self.non_finite |= ~finite_rows(self.answer)
        device = self.answer.device
        return EarlyExitOutput(
            logits=self.answer,
            exit_layer=torch.from_numpy(self.exit_layer).to(device),
            non_finite=torch.from_numpy(self.non_finite).to(device),
        )

    def at_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Reads exit `number` where a decision may depend on it, and lets rows stop there."""
        if self.asks(block, number):
            self.take(number, *self.read(block, number, frame))

    def asks(self, block: BadgeBlock, number: int) -> bool:
        """Whether the logits of exit `number` are wanted, where there is one. Comes once at each block."""
        if number not in self._own:
            return False
        j = self._position
        self._position += 1
        needed = self.schedule.needed[j]
        if needed and not self.schedule.final[j]:
            needed = self.policy.may_stop(self.history)
        if not needed and number not in self._linked:
            self._dtype = self._dtype or logits_dtype(block.own_exit(self.exits.adapter, number))
            self._undecided.append(None)
            return False
        return True

    def take(self, number: int, logits: Tensor, uncertainty: Tensor | None) -> None:
        """Takes what exit `number` says of each row in the states, and lets rows stop there."""
        j = self._position - 1
        self.note_dtype(logits.dtype)
        active = self.active_units()
        if self.schedule.final[j]:
            self.stop(logits, active, np.ones(self.num_active, dtype=bool), number)
            return
        if not self.schedule.needed[j]:  # a deeper exit builds on this one
            self._undecided.append(None)
            return
        found = [logits] if uncertainty is None else [logits, uncertainty]
        self._undecided.append(found if active is None else [_take(x, active) for x in found])
        if self.schedule.able[j]:
            self._bring_up_to_date()
            stops = self.policy.stops(self.history, j)
            if self.history.finite is not None:
                self.non_finite[self.exit_layer < 0] |= ~self.history.finite.all(axis=0)
            if np.count_nonzero(stops):
                self.stop(logits, active, stops, number)
                if self.num_active:
                    self.history.keep(~stops)

    def note_dtype(self, dtype: torch.dtype) -> None:
        """Notes in which precision exits answer."""
        self._dtype = dtype

    def is_active(self) -> Array:
        """[n] bool, of the reader's rows in the states: those that have no answer yet."""
        return self.exit_layer[self._places] < 0

    def active_units(self) -> Array | None:
        """Places of the rows in the states that have no answer yet; None: all of them."""
        return np.flatnonzero(self.is_active()) if self.has_answered else None

    def rows_non_finite(self) -> Array:
        """[n] bool: `non_finite` of each row."""
        return self.non_finite

    def keep_rows(self, kept: Array, index: Tensor, length: int | None) -> None:
        """Goes on with some of its rows in the states; others may still ask about one that has its answer here."""
        super().keep_rows(kept, index, length)
        self._places = self._places[kept]
        self.has_answered = len(self._places) > self.num_active

    def _bring_up_to_date(self) -> None:
        """Puts the exits since the last decision into the history: one transfer for all of them, as each waits for
        the device. No row has stopped in between."""
        computed = [entry for entry in self._undecided if entry is not None]
        host = zip(*map(on_host, zip(*computed, strict=True)), strict=True)  # by exit: logits, and uncertainty
        for entry in self._undecided:
            if entry is None:
                self.history.skip()
            else:
                self.history.append(*next(host))
        self._undecided.clear()

    def stop(self, logits: Tensor, active: Array | None, stops: Array, number: int) -> None:
        """Of the rows in the states those `active`, and of these the ones that `stops` marks, stop at `number`."""
        places = np.flatnonzero(stops) if active is None else active[stops]
        if len(places) == len(self.exit_layer):
            self._answer_all(logits, number)
            return
        self._store(_take(logits, places), self._places[places], number)
        self.has_answered = True

    def _answer_all(self, logits: Tensor, number: int) -> None:
        self.answer, self.num_active = logits, 0
        self.exit_layer[:] = number
        self.has_answered = True

    def _store(self, logits: Tensor, rows: Array, number: int) -> None:
        """Keeps `logits`, whose rows are the `rows` among all rows, as their answer."""
        if self.answer is None:
            self.answer = logits.new_zeros(len(self.exit_layer), logits.shape[-1])
        self.answer[torch.from_numpy(rows).to(self.answer.device)] = logits.to(self.answer)
        self.exit_layer[rows] = number
        self.num_active -= len(rows)


def linked_exits(schedule: Schedule, exits: AdapterExits) -> set[int]:
    """Block numbers of exits that need one another, up to the last one on which a decision may depend."""
    reached = zip(exits.numbers[: schedule.end + 1], schedule.needed, strict=False)
    return exits.linked_to(number for number, needed in reached if needed)


def logits_dtype(exit_: Exit) -> torch.dtype:
    """The precision in which an exit would answer."""
    device = exit_.linear.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else exit_.linear.weight.dtype


def finite_rows(logits: Tensor) -> Array:
    """[n, K] -> [n] bool, which rows have no NaN and no infinity."""
    if logits.is_cpu:
        return np.isfinite(logits.float().numpy()).all(axis=-1)
    return logits.isfinite().all(dim=-1).cpu().numpy()


def on_host(values: Sequence[Tensor]) -> list[Array]:
    """Equal shapes in, float32 arrays in numpy out."""
    if values[0].is_cpu:
        return [x.numpy() if x.dtype is torch.float32 else x.float().numpy() for x in values]
    return list(torch.stack([x.float() for x in values]).cpu().numpy())


def _take(values: Tensor, rows: Array) -> Tensor:
    return values.index_select(0, torch.from_numpy(rows).to(values.device))
