"""`EarlyExitRun`: a call in which each row stops at the exit that the policy of its adapter chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.pass_ import LeavingRun
from badge_peft.early_exit.policies import ExitPolicy, build_policy
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.exits import Exit
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.run import Frame

Array = np.ndarray


class EarlyExitRun(LeavingRun):
    """The rows of one adapter: its exits are read, and its policy says which rows stop. Exits whose logits no decision
    can depend on are not computed.

    Args:
        policy: Decides, on the host.
        num_labels: K.
        problem_type: For the policy.
        (the others as `ExitRun`, `exit_layers` among them)

    Attributes:
        answer: [B, K], logits of the rows that have stopped.
    """

    def __init__(self, *args: Any, policy: ExitPolicy, num_labels: int, problem_type: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy.check(self.exit_layers, num_labels, problem_type)
        self.policy = policy
        self.history = ExitHistory(self.exit_layers, self.batch_size, num_labels, problem_type)
        self.answer: Tensor | None = None
        if not policy.reads_uncertainty:
            self.learn_to_exit = None
        self._position = 0  # of the next exit among all exits
        self._undecided: list[list[Tensor] | None] = []  # exits since the last decision; None: one not computed
        self._dtype: torch.dtype | None = None  # of the exits' logits

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

    def read_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Reads exit `number` of `block`, where there is one and somebody asks for it, and lets rows stop there."""
        if not block.has_exit(self.adapter, number):
            return
        exits, j = self.exit_layers, self._position
        self._position += 1
        exit_ = block.own_exit(self.adapter, number)
        if not (self.policy.needs_logits(exits, j) or exit_.feeds_later_exits):
            self._dtype = self._dtype or logits_dtype(exit_)
            self._undecided.append(None)
            return
        logits = self._read(block, number, frame)  # a row for each that is in the states
        self._dtype = logits.dtype
        going = None  # which of these have not stopped; None: all
        if self.waiting:
            going = np.flatnonzero(self.exit_layer[self.survivors.rows] < 0)
        if self.policy.is_final(exits, j):
            self._stop(logits, going, np.ones(self.left, dtype=bool), number)
            return
        found = [logits, self.doubts[number]] if number in self.doubts else [logits]
        self._undecided.append(found if going is None else [_take(x, going) for x in found])
        if self.policy.can_exit(exits, j):
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
        self.waiting = True

    def _store(self, logits: Tensor, rows: Array, number: int) -> None:
        """Keeps `logits`, whose rows are the `rows` of the batch, as their answer."""
        if self.answer is None:
            self.answer = logits.new_zeros(self.batch_size, logits.shape[-1])
        self.answer[torch.from_numpy(rows).to(self.answer.device)] = logits.to(self.answer)
        self.exit_layer[rows] = number
        self.left -= len(rows)


def run_fields(config: BadgeConfig, early_exit_config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """What an `EarlyExitRun` has to know of the adapter with this `config`; `early_exit_config` None: its own."""
    return {
        "policy": build_policy(config.early_exit if early_exit_config is None else early_exit_config, **overrides),
        "num_labels": config.resolved_labels,
        "problem_type": config.resolved_problem_type,
    }


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
