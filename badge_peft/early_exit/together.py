"""`TaskReaders`: the readers of many tasks on the same rows, which read and decide together what is alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.divergences import LARGEST_LOGIT
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policy_reader import PolicyReader, on_host
from badge_peft.tuner.context import Frame
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.stacked import read_stacked

Array = np.ndarray
Found = dict[PolicyReader, tuple[Tensor, Tensor | None]]  # logits [n, K] and uncertainty [n] of an exit


class TaskReaders:
    """Several readers of all rows, which a pass takes for one: a row is active until all of them have its answer.

    Args:
        readers: Of each task.
    """

    first = 0

    def __init__(self, readers: Sequence[PolicyReader]) -> None:
        self.readers = list(readers)
        self.rows = readers[0].rows
        self.adapters = [reader.exits.adapter for reader in readers]
        pools: dict[str, list[PolicyReader]] = {}
        alike: dict[Hashable, list[PolicyReader]] = {}
        for reader in readers:
            if not reader.reads_uncertainty and not reader.exits.reads_tokens:
                pools.setdefault(reader.exits.pooling, []).append(reader)
            key = reader.policy.company(reader.exits.num_labels)
            own: Hashable = id(reader) if key is None or reader.exits.are_linked else None
            exits = reader.exits
            alike.setdefault((key, own, tuple(exits.numbers), exits.problem_type), []).append(reader)
        self._pools = [pool for pool in pools.values() if len(pool) > 1]
        self._share_poolings()
        self._decisions = [JointDecision(group) for group in alike.values() if len(group) > 1]
        self._alone = [group[0] for group in alike.values() if len(group) == 1]

    @property
    def num_active(self) -> int:
        """Answers that are not there yet, over all tasks."""
        return sum(reader.num_active for reader in self.readers)

    @property
    def has_answered(self) -> bool:
        """Whether rows in the states might have all of their answers."""
        return all(reader.has_answered for reader in self.readers)

    def at_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Reads exit `number` for the tasks that ask for it, and lets rows stop there."""
        asking = [reader for reader in self.readers if reader.num_active and reader.asks(block, number)]
        if not asking:
            return
        found: Found = {}
        for pool in self._pools if len(asking) > 1 else []:
            places = [i for i, reader in enumerate(pool) if reader in asking]
            exits = [reader.exits for reader in pool]
            stacked = read_stacked(block, number, frame, exits, places, pool[0].pooling)
            found.update({pool[i]: (logits, None) for i, logits in stacked.items()})
        for reader in asking:
            if reader not in found:
                found[reader] = reader.read(block, number, frame)
        for decision in self._decisions:
            decision.take(number, found)
        for reader in self._alone:
            if reader in found:
                reader.take(number, *found[reader])

    def is_active(self) -> Array:
        """[n] bool, of the rows in the states: those that lack an answer."""
        return np.logical_or.reduce([reader.is_active() for reader in self.readers])

    def keep_rows(self, kept: Array, index: Tensor, length: int | None) -> None:
        """As `ExitReader.keep_rows`, for each."""
        for reader in self.readers:
            reader.keep_rows(kept, index, length)
        self._share_poolings()

    def _share_poolings(self) -> None:
        for pool in self._pools:  # what a pooling works out of the mask, it works out once
            for reader in pool:
                reader.pooling = pool[0].pooling


class JointDecision:
    """Rows of several readers side by side in one history: one array operation decides for all of them.

    Their policies differ in nothing but the threshold and the exits at which rows may stop.

    Args:
        readers: With the same exits and problem type.
    """

    def __init__(self, readers: Sequence[PolicyReader]) -> None:
        self.readers = list(readers)
        self.policy, exits = readers[0].policy, readers[0].exits
        self._labels = max(reader.exits.num_labels for reader in readers)
        rows = sum(reader.num_active for reader in readers)
        self.history = ExitHistory(exits.numbers, rows, self._labels, exits.problem_type)
        own = [reader.policy.threshold(reader.exits.num_labels, exits.problem_type) for reader in readers]
        self._thresholds = np.repeat(np.array(own, dtype=np.float32), [reader.num_active for reader in readers])
        self._undecided: dict[int, Tensor] = {}  # index of an exit -> logits, of the exits since the last decision

    def take(self, number: int, found: Found) -> None:
        """Takes what exit `number` says of each row in the states, and lets rows stop there."""
        history, exits = self.history, self.history.exits
        j = exits.index(number)
        going = [reader for reader in self.readers if reader.num_active]
        asking = [reader for reader in going if reader in found]  # at block M the model's own head may answer
        final = {reader for reader in asking if reader.policy.is_final(exits, j)}
        others = [reader for reader in asking if reader not in final]
        deciding = {reader for reader in others if reader.policy.can_exit(exits, j)}
        if others:
            self._undecided[j] = self._side_by_side(going, {reader: found[reader] for reader in others})
        left = np.zeros(history.rows, dtype=bool)
        stops: Array = left
        doubtful: Any = None
        if deciding:
            self._bring_up_to_date(j)
            stops = self.policy.should_exit_by(history, j, self._thresholds)
            if history.finite is not None:
                stops = stops & self.policy.trusts(history, j)
                doubtful = ~history.finite.all(axis=0)
        end = 0
        for reader in going:
            own = slice(end, end + reader.num_active)
            end = own.stop
            if reader in final:
                left[own] = True
                reader.take(number, *found[reader])
            elif reader in deciding:
                if doubtful is not None:
                    reader.non_finite[reader.exit_layer < 0] |= doubtful[own]
                if stops[own].any():
                    left[own] = stops[own]
                    reader.stop(found[reader][0], reader.active_units(), stops[own], number)
        if left.any() and not left.all():
            self._bring_up_to_date(j)  # before its rows are others
            history.keep(~left)
            self._thresholds = self._thresholds[~left]

    def _side_by_side(self, readers: Sequence[PolicyReader], found: Found) -> Tensor:
        """[n, K]: the logits of all rows of the `readers`; what a task does not have (labels, or this exit, which none
        of its decisions reads) is as good as impossible."""
        device = next(iter(found.values()))[0].device
        rows = (self.history.rows, self._labels)
        wide = torch.full(rows, -float(LARGEST_LOGIT), dtype=torch.float32, device=device)
        host: Any = wide.numpy() if wide.is_cpu else None  # shares its memory: small copies take less time there
        end = 0
        for reader in readers:
            start, end = end, end + reader.num_active
            if reader not in found:
                continue
            logits, active = found[reader][0], reader.active_units()
            reader.note_dtype(logits.dtype)
            if active is not None:
                logits = logits[torch.from_numpy(active).to(logits.device)]
            if host is None:
                wide[start:end, : logits.shape[1]] = logits
            else:
                host[start:end, : logits.shape[1]] = on_host([logits])[0]
        return wide

    def _bring_up_to_date(self, j: int) -> None:
        """Puts the exits since the last decision into the history: one transfer for all of them."""
        computed = iter(on_host([self._undecided[i] for i in sorted(self._undecided)]) if self._undecided else ())
        for i in range(self.history.seen, j + 1):
            if i in self._undecided:
                self.history.append(next(computed))
            else:
                self.history.skip()
        self._undecided.clear()
