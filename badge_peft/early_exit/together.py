"""`TaskReaders`: the readers of many tasks on the same rows, which read and decide together what is alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policy_reader import PolicyReader, on_host
from badge_peft.early_exit.readers import ExitReader
from badge_peft.tuner.carry import carry_together
from badge_peft.tuner.context import Frame
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.stacked import MISSING, read_stacked

Array = np.ndarray


class Readings:
    """What an exit says to several readers: to some of them side by side, in one product, and to others one by one."""

    def __init__(self) -> None:
        self.products: list[tuple[list[PolicyReader], Tensor]] = []  # T readers, and their logits [T, n, K]
        self._found: dict[PolicyReader, tuple[Tensor, Tensor | None]] = {}
        self._places: dict[PolicyReader, tuple[Tensor, int]] = {}

    def __contains__(self, reader: PolicyReader) -> bool:
        return reader in self._places or reader in self._found

    def put(self, reader: PolicyReader, logits: Tensor, uncertainty: Tensor | None) -> None:
        """What one reader has read."""
        self._found[reader] = logits, uncertainty

    def put_product(self, readers: list[PolicyReader], logits: Tensor) -> None:
        """What several have, [T, n, K], K the most labels of any."""
        self.products.append((readers, logits))
        self._places.update({reader: (logits, i) for i, reader in enumerate(readers)})

    def of(self, reader: PolicyReader) -> tuple[Tensor, Tensor | None]:
        """Logits [n, K] and uncertainty [n] for one reader."""
        if reader in self._found:
            return self._found[reader]
        logits, i = self._places[reader]
        return logits[i, :, : reader.exits.num_labels], None


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
            alone = key is None or reader.exits.need_more_than_logits or not reader.schedule.decides
            own: Hashable = id(reader) if alone else None
            exits = reader.exits
            alike.setdefault((key, own, tuple(exits.numbers), exits.problem_type), []).append(reader)
        self._pools = [(pool, [reader.exits for reader in pool]) for pool in pools.values() if len(pool) > 1]
        self._share_poolings()
        self._decisions = [JointDecision(group) for group in alike.values() if len(group) > 1]
        self._alone = [group[0] for group in alike.values() if len(group) == 1]

    @property
    def num_active(self) -> int:
        """Answers that are not there yet, over all tasks."""
        return sum([reader.num_active for reader in self.readers])

    @property
    def has_answered(self) -> bool:
        """Whether rows in the states might have all of their answers."""
        return all(reader.has_answered for reader in self.readers)

    def at_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Reads exit `number` for the tasks that ask for it, and lets rows stop there."""
        asking = [reader for reader in self.readers if reader.num_active and reader.asks(block, number)]
        if not asking:
            return
        found, asked = Readings(), set(asking)
        for pool, exits in self._pools if len(asking) > 1 else []:
            places = [i for i, reader in enumerate(pool) if reader in asked]
            for members, logits in read_stacked(block, number, frame, exits, places, pool[0].pooling):
                own = [pool[i] for i in members]
                found.put_product(own, carried(block, number, own, logits))
        for reader in asking:
            if reader not in found:
                found.put(reader, *reader.read(block, number, frame))
        for decision in self._decisions:
            decision.take(number, found)
        for reader in self._alone:
            if reader in found:
                reader.take(number, *found.of(reader))

    def is_active(self) -> Array:
        """[n] bool, of the rows in the states: those that lack an answer."""
        return np.logical_or.reduce([reader.is_active() for reader in self.readers])

    def keep_rows(self, kept: Array, index: Tensor, length: int | None) -> None:
        """As `ExitReader.keep_rows`, for each."""
        for reader in self.readers:
            reader.keep_rows(kept, index, length)
        self._share_poolings()

    def _share_poolings(self) -> None:
        for pool, _ in self._pools:  # what a pooling works out of the mask, it works out once
            for reader in pool:
                reader.pooling = pool[0].pooling


def carried(block: BadgeBlock, number: int, readers: Sequence[ExitReader], logits: Tensor) -> Tensor:
    """What exits `number` of T readers answer, [T, n, K], given what they say by themselves."""
    if all(reader.exits.carry is None for reader in readers):
        return logits
    return carry_together(
        [reader.exits for reader in readers],
        [block.own_exit(reader.exits.adapter, number) for reader in readers],
        [reader.state for reader in readers],
        logits,
    )


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
        self._going = [reader for reader in readers if reader.num_active]
        self._undecided: dict[int, Tensor] = {}  # index of an exit -> logits, of the exits since the last decision

    def take(self, number: int, found: Readings) -> None:
        """Takes what exit `number` says of each row in the states, and lets rows stop there."""
        history = self.history
        asking = [reader for reader in self._going if reader in found]  # at block M the model's own head may answer
        if not asking:
            return
        j = history.exits.index(number)
        final = {reader for reader in asking if reader.schedule.final[j]}
        # exits that others build on are read where no decision depends on them, too
        reading = [reader for reader in asking if reader not in final and reader.schedule.needed[j]]
        deciding = {reader for reader in reading if reader.schedule.able[j]}
        if reading:
            self._undecided[j] = self._side_by_side(reading, found)
        stops: Any = None
        doubtful: Any = None
        if deciding:
            self._bring_up_to_date(j)
            stops = self.policy.should_exit_by(history, j, self._thresholds)
            if history.finite is not None:
                stops = stops & self.policy.trusts(history, j)
                doubtful = ~history.finite.all(axis=0)
        if not final and doubtful is None and (stops is None or not np.count_nonzero(stops)):
            return
        left, end = np.zeros(history.rows, dtype=bool), 0
        for reader in self._going:
            own = slice(end, end + reader.num_active)
            end = own.stop
            if reader in final:
                left[own] = True
                reader.take(number, *found.of(reader))
            elif stops is not None and reader in deciding:
                if doubtful is not None:
                    reader.non_finite[reader.exit_layer < 0] |= doubtful[own]
                if stops[own].any():
                    left[own] = stops[own]
                    reader.stop(found.of(reader)[0], reader.active_units(), stops[own], number)
        if not left.any():
            return
        self._going = [reader for reader in self._going if reader.num_active]
        if self._going:
            self._bring_up_to_date(j)  # before its rows are others
            history.keep(~left)
            self._thresholds = self._thresholds[~left]

    def _side_by_side(self, reading: list[PolicyReader], found: Readings) -> Tensor:
        """[n, K]: the logits of all rows that go on; what a task does not have (labels, or this exit, which none of
        its decisions reads) is as good as impossible."""
        rows = (self.history.rows, self._labels)
        product = self._product(reading, found)
        if product is not None and product[0].shape == rows:
            return product[0]
        device = found.of(reading[0])[0].device
        wide = torch.full(rows, MISSING, dtype=torch.float32, device=device)
        if product is not None:
            logits, start = product
            wide[start : start + len(logits), : logits.shape[1]] = logits
            return wide
        host: Any = wide.numpy() if wide.is_cpu else None  # shares its memory: small copies take less time there
        end, asked = 0, set(reading)
        for reader in self._going:
            start, end = end, end + reader.num_active
            if reader not in asked:
                continue
            logits, active = found.of(reader)[0], reader.active_units()
            reader.note_dtype(logits.dtype)
            if active is not None:
                logits = logits[torch.from_numpy(active).to(logits.device)]
            if host is None:
                wide[start:end, : logits.shape[1]] = logits
            else:
                host[start:end, : logits.shape[1]] = on_host([logits])[0]
        return wide

    def _product(self, reading: list[PolicyReader], found: Readings) -> tuple[Tensor, int] | None:
        """Logits [n', K] of those who read, and the first of these rows: where one product has them as the history
        wants them. None: it has not."""
        for readers, logits in found.products:
            first = self._going.index(readers[0]) if readers == reading else 0
            fits = readers == reading == self._going[first : first + len(readers)]
            if fits and logits.dtype is torch.float32 and not any(reader.has_answered for reader in readers):
                for reader in readers:
                    reader.note_dtype(torch.float32)
                # cut where others of the product, which are not in this group, have more labels
                return logits.flatten(0, 1)[:, : self._labels], sum(
                    reader.num_active for reader in self._going[:first]
                )
        return None

    def _bring_up_to_date(self, j: int) -> None:
        """Puts the exits since the last decision into the history: one transfer for all of them."""
        computed = iter(on_host([self._undecided[i] for i in sorted(self._undecided)]) if self._undecided else ())
        for i in range(self.history.seen, j + 1):
            if i in self._undecided:
                self.history.append(next(computed))
            else:
                self.history.skip()
        self._undecided.clear()
