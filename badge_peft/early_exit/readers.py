"""Readers: one adapter that asks about some of the rows of a pass, and knows their answers.

A reader has the adapter's exits, a policy, the history of its rows and their answers; it never runs a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import ExitPolicy, Schedule, schedule_of
from badge_peft.outputs import EarlyExitOutput
from badge_peft.tuner.context import Frame
from badge_peft.tuner.decoders import read_mask
from badge_peft.tuner.exits import AdapterExits, ExitState, Pooling
from badge_peft.tuner.layer import BadgeBlock

Array = np.ndarray


class ExitReader:
    """Reads the exits of one adapter. It asks about n `rows`, which lie side by side in the batch from `first` on. The
    mask is [n, S] or None; [1, S] holds for all of them."""

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
        self.num_active = rows  # that have no answer yet
        self.has_answered = False  # whether rows in the states have their answer, so that they might be taken out

    def on_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Takes note of exit `number` (0: of the embeddings) of `block`, which has just run, where the adapter has
        one; `frame` has a row for each of the reader's rows in the states."""
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
        """Goes on with the rows `kept` [k] of those in the states (`index`: the same, where these are), and with their
        first `length` positions (None: all)."""
        self.pooling = self.pooling.rows(index, length)
        self.state.keep_rows(index, length)


def exit_reader(badge: Any, exits: AdapterExits, inputs: dict[str, Tensor]) -> ExitReader:
    """Who reads exits for all rows of `badge`, a `BadgeModel`, at the positions at which a call of it does."""
    mask = read_mask(badge.model, badge.layout, exits.pooling, inputs)
    return ExitReader(exits, inputs["input_ids"].shape[0], mask)


class PolicyReader(ExitReader):
    """Each row stops at the exit that the policy chooses. Exits on whose logits no decision depends are not computed.

    What stops is a *unit*: here a row, in a `TokenReader` a token. `groups` [n] has a number for each row, the same
    for the candidates of a query; None: all rows are one group.
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
        self.answer: Tensor | None = None  # [n, K], of the rows that have stopped
        self.exit_layer: Array = np.full(rows, -1, dtype=np.int64)  # where they have; -1: they have not
        self.non_finite: Array = np.zeros(rows, dtype=bool)  # of which a decision has seen NaN or infinity
        self.reads_uncertainty = policy.reads_uncertainty
        self._groups = groups
        self._own = frozenset(exits.numbers[: None if exits.has_final_exit else -1])  # others are the model's own head
        self._places: Array = np.arange(rows)  # of the rows in the states among all rows
        self._position = 0  # of the next exit among all exits
        self._pending: list[list[Tensor] | None] = []  # exits since the last decision; None: one not computed
        self._dtype: torch.dtype | None = None  # of the exits' logits
        self._linked = linked_exits(self.schedule, exits)

    @cached_property
    def history(self) -> ExitHistory:
        """Of the units that have no answer yet."""
        exits = self.exits
        return ExitHistory(exits.numbers, self.num_active, exits.num_labels, exits.problem_type, self._groups)

    @property
    def reads_exits(self) -> bool:
        """Whether any exit of its own is computed; else the model's own head answers every row."""
        read = (m for m, needed in zip(self.exits.numbers, self.schedule.needed, strict=True) if needed)
        return bool(self._linked) or not self._own.isdisjoint(read)

    def on_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Reads exit `number` where a decision may depend on it, and lets rows stop there."""
        if self.needs_exit(block, number):
            self.update(number, *self.read(block, number, frame))

    def needs_exit(self, block: BadgeBlock, number: int) -> bool:
        """Whether the logits of exit `number` are wanted, where there is one. Comes once at each block."""
        if number not in self._own:
            return False
        j = self._position
        self._position += 1
        needed = self.schedule.needed[j]
        if needed and not self.schedule.final[j]:
            needed = self.policy.may_stop(self.history)
        if not needed and number not in self._linked:
            self._dtype = self._dtype or module_dtype(block.own_exit(self.exits.adapter, number).linear)
            self._pending.append(None)
            return False
        return True

    def update(self, number: int, logits: Tensor, uncertainty: Tensor | None) -> None:
        """Takes what exit `number` says of each row in the states, and lets rows stop there."""
        j = self._position - 1
        self._dtype = logits.dtype
        active = self.active_units()
        if self.schedule.final[j]:
            self.stop(logits, active, np.ones(self.num_active, dtype=bool), number)
            return
        if not self.schedule.needed[j]:  # a deeper exit builds on this one
            self._pending.append(None)
            return
        found = [logits] if uncertainty is None else [logits, uncertainty]
        self._pending.append(found if active is None else [_take(x, active) for x in found])
        if self.schedule.able[j]:
            self._flush_pending()
            stops = self.policy.stops(self.history, j)
            if self.history.finite is not None:
                self.non_finite[self.exit_layer < 0] |= ~self.history.finite.all(axis=0)
            if np.count_nonzero(stops):
                self.stop(logits, active, stops, number)
                if self.num_active:
                    self.history.keep(~stops)

    def stop(self, logits: Tensor, active: Array | None, stops: Array, number: int) -> None:
        """Of the rows in the states those `active`, and of these the ones that `stops` marks, stop at `number`."""
        places = np.flatnonzero(stops) if active is None else active[stops]
        if len(places) == len(self.exit_layer):
            self._answer_all(logits, number)
        else:
            self._store(_take(logits, places), self._places[places], number)
        self.has_answered = True

    def finish(self, logits: Tensor) -> None:
        """Gives the rows that are active the answer of the model's own head, [n, K]."""
        self.settle(logits.dtype)
        if self.num_active == len(self.exit_layer):
            self._answer_all(logits.to(self._dtype), self.exits.numbers[-1])
        elif self.num_active:
            rows = np.flatnonzero(self.exit_layer < 0)
            self._store(_take(logits, rows).to(self._dtype), rows, self.exits.numbers[-1])

    def settle(self, dtype: torch.dtype) -> None:
        """Answers in one precision, whichever exit gives them: that of the exits, or `dtype` of the model's own head
        where it is higher."""
        self._dtype = dtype if self._dtype is None else torch.promote_types(dtype, self._dtype)
        if self.answer is not None:
            self.answer = self.answer.to(self._dtype)

    def output(self) -> EarlyExitOutput:
        """The answers, once every row has its own; `non_finite` has the rows whose answer is, too."""
        assert self.answer is not None
        self.non_finite |= ~_finite_rows(self.answer)
        device = self.answer.device
        return EarlyExitOutput(
            logits=self.answer,
            exit_layer=torch.from_numpy(self.exit_layer).to(device),
            non_finite=torch.from_numpy(self.non_finite).to(device),
        )

    def is_active(self) -> Array:
        """[n] bool, of the reader's rows in the states: those that have no answer yet."""
        return self.exit_layer[self._places] < 0

    def active_units(self) -> Array | None:
        """Places of the units in the states that have no answer yet; None: all of them."""
        return np.flatnonzero(self.exit_layer[self._places] < 0) if self.has_answered else None

    def rows_non_finite(self) -> Array:
        """[n] bool: `non_finite` of each row."""
        return self.non_finite

    def keep_rows(self, kept: Array, index: Tensor, length: int | None) -> None:
        """Goes on with some of its rows in the states; others may still ask about one that has its answer here."""
        super().keep_rows(kept, index, length)
        self._places = self._places[kept]
        self.has_answered = len(self._places) > self.num_active

    def _flush_pending(self) -> None:
        """Puts the exits since the last decision into the history: one transfer for all of them, as each waits for
        the device. No row has stopped in between."""
        computed = [entry for entry in self._pending if entry is not None]
        host = zip(*map(_on_host, zip(*computed, strict=True)), strict=True)  # by exit: logits, and uncertainty
        for entry in self._pending:
            if entry is None:
                self.history.skip()
            else:
                self.history.append(*next(host))
        self._pending.clear()

    def _answer_all(self, logits: Tensor, number: int) -> None:
        self.answer, self.num_active = logits, 0
        self.exit_layer[:] = number

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


def module_dtype(module: nn.Module) -> torch.dtype:
    """The precision in which a layer that gives logits would answer."""
    weight: Any = module._parameters.get("weight")
    weight = next(module.parameters()) if weight is None else weight
    hook = getattr(module, "_hf_hook", None)  # of weights that are elsewhere between calls, by accelerate
    device = torch.device(getattr(hook, "execution_device", None) or weight.device).type
    device = "cpu" if device == "meta" else device
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _finite_rows(logits: Tensor) -> Array:
    """[n, K] -> [n] bool, which rows have no NaN and no infinity."""
    if logits.is_cpu:
        return np.isfinite(logits.float().numpy()).all(axis=-1)
    return logits.isfinite().all(dim=-1).cpu().numpy()


def _on_host(values: Sequence[Tensor]) -> list[Array]:
    """Equal shapes in, float32 arrays in numpy out."""
    if values[0].is_cpu:
        return [x.numpy() if x.dtype is torch.float32 else x.float().numpy() for x in values]
    return list(torch.stack([x.float() for x in values]).cpu().numpy())


def _take(values: Tensor, rows: Array) -> Tensor:
    return values.index_select(0, torch.from_numpy(rows).to(values.device))
