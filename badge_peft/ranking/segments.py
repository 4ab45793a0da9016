"""All candidates of a query, exit by exit, though no more than `batch_size` of them are ever in a block.

Where they fit into memory together they are one call of the model, a `SlicedPass`. Where they do not, there are
segments. A *segment* is what lies between two decisions: the blocks behind one and up to the next. It runs slice by
slice, the candidates sorted by length and each slice as long as its longest. Every slice is a call of the model as
ever, so the Hugging Face layer loop stays in control: blocks outside of the segment hand their input on, and the first
block inside gets the states that the segment before has left in the `StateStore`. What leaves is gone from all further
slices. That takes longer, as each call computes the embeddings again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import ExitPolicy, schedule_of
from badge_peft.early_exit.readers import ExitReader, PolicyReader, exit_reader, linked_exits
from badge_peft.evaluation.collate import pad_features
from badge_peft.model import BadgeModel
from badge_peft.ranking.slices import SlicedPass, StatesChanged
from badge_peft.tuner.context import BlockPass, Frame, as_result, get_hidden_states, with_states
from badge_peft.tuner.decoders import decoder_arguments, read_mask
from badge_peft.tuner.layer import BadgeBlock

Array = np.ndarray

#: Models whose loop has turned out to change states between blocks, which a `SlicedPass` cannot do.
_CHANGES_STATES: WeakSet[nn.Module] = WeakSet()
_STATES = "hidden"  # in the store, beside what exits leave for the deeper ones
_COPIES = 4  # of the states of all candidates, while embeddings are computed


@dataclass
class RankedCandidates:
    """What came of the candidates of a query."""

    scores: Array  # [N] float32, of the exit at which each stopped
    exit_layer: Array  # [N], the block that answered
    left: dict[int, int]  # block number of each exit at which candidates could leave -> how many went on behind it
    non_finite: Array  # [N] bool, those with a score that was NaN or infinite where it was looked at


class StateStore:
    """Tensors by name that have a row for each candidate, [N, ...], or one for each of its positions: these lie side
    by side in a buffer that every segment overwrites in place. What is larger than `max_bytes` goes into a temporary
    file, which the system reads and writes in pages. `lengths` [N] are the positions of each candidate."""

    def __init__(self, lengths: Array, max_bytes: int) -> None:
        self.lengths, self.max_bytes = lengths.tolist(), max_bytes
        self._starts = (np.cumsum(lengths) - lengths).tolist()
        self._of_rows: dict[str, Tensor] = {}
        self._of_positions: dict[str, tuple[Tensor, torch.device]] = {}

    def put(self, rows: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Keeps what b `rows` have, [b, ...] or [b, S, d] each."""
        for name, value in values.items():
            if value.dim() < 3:
                if name not in self._of_rows:
                    self._of_rows[name] = value.new_zeros(len(self.lengths), *value.shape[1:])
                self._of_rows[name][torch.tensor(rows, device=value.device)] = value
                continue
            if name not in self._of_positions:
                self._of_positions[name] = self._buffer(value), value.device
            buffer, _ = self._of_positions[name]
            for row, own in zip(rows, value, strict=True):
                start, length = self._starts[row], self.lengths[row]
                buffer[start : start + length] = own[:length].to(buffer.device)

    def names(self) -> set[str]:
        """Of what has been kept so far."""
        return {*self._of_rows, *self._of_positions}

    def get(self, rows: Sequence[int], names: set[str]) -> dict[str, Tensor]:
        """What `rows` have under these names, with zeros behind each but the longest."""
        found = {name: x[torch.tensor(rows, device=x.device)] for name, x in self._of_rows.items() if name in names}
        for name in names & self._of_positions.keys():
            buffer, device = self._of_positions[name]
            parts = [buffer[self._starts[row] : self._starts[row] + self.lengths[row]] for row in rows]
            found[name] = pad_sequence(parts, batch_first=True).to(device)
        return found

    def _buffer(self, like: Tensor) -> Tensor:
        """[all positions, d], of the width, precision and, in memory, device of `like`."""
        count, width = sum(self.lengths), like.shape[-1]
        if count * width * like.element_size() <= self.max_bytes:
            return like.new_empty(count, width)
        with TemporaryFile() as file:  # gone with the last reference to it
            pages = np.memmap(file, dtype=np.uint8, mode="w+", shape=(count, width * like.element_size()))
        return torch.from_numpy(pages).view(like.dtype)


class SegmentPass(BlockPass):
    """One slice in the blocks of one segment (none in that of exit 0): from `states`, H of the block before the first,
    where that is not the model's own input, to H of the last, and `scores`, from exits to [b, 1]. `tuple_length` is
    that of what a block returns, 0 for a tensor; None: no block has run yet."""

    def __init__(
        self, reader: ExitReader, blocks: range, exits: list[int], states: Tensor | None, tuple_length: int | None
    ) -> None:
        super().__init__()
        self.reader, self.blocks, self.exits = reader, blocks, exits
        self.states, self.tuple_length = states, tuple_length
        self.scores: dict[int, Tensor] = {}

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block` where it belongs to the segment."""
        number = self.number_of(block)
        hidden = get_hidden_states(args, kwargs)
        if number == 1:
            self._read(block, 0, Frame(hidden))
        if number == self.blocks.stop:
            self.states = hidden
        if number not in self.blocks and self.tuple_length is not None:
            return as_result(hidden, self.tuple_length)
        if number == self.blocks.start and self.states is not None:
            args, kwargs = with_states(self.states, args, kwargs)
        result, frame = self.run_block(block, args, kwargs)
        self.tuple_length = len(result) if isinstance(result, tuple) else 0
        self._read(block, number, frame)
        return result

    def _read(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        if number in self.exits and block.has_exit(self.reader.exits.adapter, number):
            self.scores[number], _ = self.reader.read(block, number, frame)


class CandidatePass:
    """The N candidates of one query, as token columns, on their way through a model in eval mode, at most `batch_size`
    in a block at once."""

    def __init__(
        self, badge: BadgeModel, rows: list[dict[str, Any]], policy: ExitPolicy, batch_size: int, max_state_bytes: int
    ) -> None:
        self.badge, self.rows, self.policy = badge, rows, policy
        self.batch_size, self.max_state_bytes = batch_size, max_state_bytes
        self.exits = badge.adapter_exits(badge.single_active_adapter())
        self.lengths: Array = np.array([len(row["input_ids"]) for row in rows])
        self.device = next(badge.model.parameters()).device
        self._store = StateStore(self.lengths, max_state_bytes)
        self._linked = linked_exits(schedule_of(policy, self.exits.numbers), self.exits)
        self._tuple_length: int | None = None

    @torch.no_grad()
    def run(self) -> RankedCandidates:
        """Until every candidate has its answer."""
        if self._bytes_together() <= self.max_state_bytes and self.badge.model not in _CHANGES_STATES:
            try:
                return self._together()
            except StatesChanged:
                _CHANGES_STATES.add(self.badge.model)
        return self._in_segments()

    def _bytes_together(self) -> int:
        """About what a call with all candidates takes: their states with padding, and a mask [N, 1, S, S]."""
        config, size = self.badge.model.config, next(self.badge.model.parameters()).element_size()
        positions = len(self.rows) * int(self.lengths.max())
        return positions * (_COPIES * config.hidden_size * size + int(self.lengths.max()) * 4)

    def _together(self) -> RankedCandidates:
        order, numbers = np.argsort(-self.lengths, kind="stable"), self.exits.numbers
        batch, n = self._batch(order.tolist()), len(self.rows)
        mask = read_mask(self.badge.model, self.badge.layout, self.exits.pooling, batch)
        mask = batch["attention_mask"] if mask is None else mask  # None: all positions of a single row
        reader = PolicyReader(self.exits, n, mask, 0, self.policy)
        chunk = getattr(self.badge.model.config, "chunk_size_feed_forward", 0) or 1  # into which blocks part positions
        lengths = np.minimum(-(-self.lengths[order] // chunk) * chunk, mask.shape[1])
        running = SlicedPass(reader, lengths, mask, self.batch_size, self.badge.num_blocks)
        base = running.run(self.badge.model, batch)
        if base is not None and not self.exits.has_final_exit:
            reader.finish(base.logits)
        output, back = reader.output(), np.argsort(order)
        logits: Any = output.logits
        stops, left = reader.exit_layer[back], {}
        for number in (m for j, m in enumerate(numbers) if self.policy.can_exit(numbers, j)):
            left[number] = int((stops > number).sum())
            if not left[number]:
                break
        return RankedCandidates(logits[:, 0].float().cpu().numpy()[back], stops, left, reader.non_finite[back])

    def _in_segments(self) -> RankedCandidates:
        numbers, n = self.exits.numbers, len(self.rows)
        history = ExitHistory(numbers, n, self.exits.num_labels, self.exits.problem_type)
        found = RankedCandidates(np.zeros(n, np.float32), np.full(n, -1, np.int64), {}, np.zeros(n, bool))
        active = np.argsort(-self.lengths, kind="stable")  # as in the history
        block, first = 1, 0
        for j in (j for j in range(len(numbers)) if self.policy.can_exit(numbers, j)):
            final, open_ = self.policy.is_final(numbers, j), self.policy.may_stop(history)
            if not (final or open_):
                found.left[numbers[j]] = len(active)
                continue
            needed = (i for i in range(first, j + 1) if self.policy.needs_logits(numbers, i))
            read = [i for i in needed if open_ or i == j]
            linked = [m for m in numbers[first : j + 1] if m in self._linked]
            scores = self._segment(active, range(block, numbers[j] + 1), [numbers[i] for i in read], linked, final)
            for i in range(first, j + 1):
                history.append(scores[read.index(i)][:, None]) if i in read else history.skip()
            stops = self.policy.stops(history, j)
            if history.finite is not None:
                found.non_finite[active] |= ~history.finite[first : j + 1].all(axis=0)
            found.scores[active[stops]] = scores[-1][stops]
            found.exit_layer[active[stops]] = numbers[j]
            active = active[~stops]
            found.left[numbers[j]] = len(active)
            if not len(active):
                break
            history.keep(~stops)
            block, first = numbers[j] + 1, j + 1
        return found

    def _segment(self, active: Array, blocks: range, exits: list[int], linked: list[int], final: bool) -> Array:
        """[R, n]: what the R `exits` say about the `active` candidates, behind these blocks. The `linked` ones are
        computed, too, as deeper exits build on them."""
        scores = np.empty((len(exits), len(active)), dtype=np.float32)
        before_segment = self._store.names()  # what is new in it, later slices do not have
        for place in range(0, len(active), self.batch_size):
            rows = active[place : place + self.batch_size].tolist()
            batch = self._batch(rows)
            reader = exit_reader(self.badge, self.exits, batch)
            reader.state.left = self._store.get(rows, before_segment)
            before = reader.state.left.pop(_STATES, None)
            running = SegmentPass(reader, blocks, [*exits, *linked], before, self._tuple_length)
            with running:
                base = self.badge.model(return_dict=True, **batch)
            self._tuple_length = running.tuple_length
            if exits[-1] not in running.scores:  # the model's own head
                running.scores[exits[-1]] = base.logits
            for r, number in enumerate(exits):
                scores[r, place : place + len(rows)] = running.scores[number][:, 0].float().cpu().numpy()
            if not final:
                self._store.put(rows, reader.state.left)
            if not final and len(blocks):
                assert running.states is not None
                self._store.put(rows, {_STATES: running.states})
        return scores

    def _batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The inputs of these candidates."""
        batch = pad_features([self.rows[i] for i in rows], self.badge.model)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        return decoder_arguments(self.badge.model, batch, len(rows))
