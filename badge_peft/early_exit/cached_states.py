"""`CachedStates`: what exits read of every row of a data set, so that they train without the blocks.

A row is kept as a full-depth pass of the frozen backbone has it. A call of the model with `cached_states` and
`cached_rows` then runs no block: the readers are handed what is kept, and the model's own head, where it is trained,
gets the last block's output by the model's own code.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.early_exit.state_passes import HeadPass, RecordingPass, frame_of, reads_of
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.pooling import Pooling
from badge_peft.utils.ragged import RaggedRows

_EVERY_TOKEN = ("all", "token_logits")  # heads of which all positions are kept
_TEXT = ("input_ids", "token_type_ids")  # what makes the text of a row


class CachedStates:
    """The states of N rows, of `counts` positions each. `cache_states` makes them; `close()`, or the end of a `with`,
    gives their place back. `example` is a pass over some rows, with the `logits` of the model's own head where the
    plan has them: it shows sizes and types."""

    def __init__(
        self, counts: Sequence[int], dtype: torch.dtype, example: RecordingPass, logits: Tensor | None
    ) -> None:
        self.plan = example.plan
        self.texts: list[bytes] = []  # what tells each row's text from others
        self.backbone: Any = None  # what tells the backbone from others
        self._places: dict[bytes, int] | None = None  # of the texts
        self._numbers: Sequence[int] | None = None  # of the rows in the storage, where these are a part of them
        self._tuple_length = example.tuple_length
        self._types = {state: value.dtype for state, value in example.states.items()}
        self._states = self._head = None
        once = [1] * len(counts)
        if example.states:
            width = next(iter(example.states.values())).shape[-1]
            places = counts if self.plan.positions == "all" else once
            self._states = RaggedRows(places, len(self.plan.states), width, dtype)
        head = example.head_of(logits)
        if head is not None:
            places = counts if self.plan.head in _EVERY_TOKEN else once
            stored = torch.float32 if self.plan.head in ("logits", "token_logits") else dtype
            self._head, self._head_type = RaggedRows(places, 1, head.shape[-1], stored), head.dtype

    def __enter__(self) -> CachedStates:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """What the states take, in memory or on the disk."""
        return sum(part.nbytes for part in self._parts())

    @property
    def is_mapped(self) -> bool:
        """Whether they are in files."""
        return any(part.is_mapped for part in self._parts())

    def select(self, rows: Sequence[int]) -> CachedStates:
        """The given rows alone, in this order. They stay where they are, until all of them are closed."""
        part = copy.copy(self)
        part.texts, part._places = [self.texts[i] for i in rows], None
        part._numbers = [self._number(i) for i in rows]
        return part

    def have(self, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Whether these are the states of the texts of `rows`, and maybe of others."""
        return set(texts_of(rows)) <= set(self.texts)

    def find(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """[B]: which rows have the texts of a batch that is padded on the right; None where it has another one."""
        mask = batch.get("attention_mask")
        if "input_ids" not in batch or mask is None or bool((mask[:, 1:] > mask[:, :-1]).any()):
            return None
        if self._places is None:
            self._places = {text: i for i, text in enumerate(self.texts)}
        names = [name for name in (*_TEXT, "attention_mask") if name in batch]
        columns = zip(*(batch[name].cpu().numpy() for name in names), strict=True)
        found = [self._places.get(text) for text in texts_of([dict(zip(names, row, strict=True)) for row in columns])]
        return None if None in found else torch.tensor(found, device=mask.device)

    def allocate(self, folder: Path | None = None) -> None:
        """Makes room for them: in memory, or in memory-mapped files in `folder`."""
        for part in self._parts():
            part.allocate(folder)

    def close(self) -> None:
        """Gives memory and files back; of selected rows, nothing."""
        if self._numbers is None:
            for part in self._parts():
                part.close()

    def _number(self, row: int) -> int:
        return row if self._numbers is None else self._numbers[row]

    def _parts(self) -> list[RaggedRows]:
        return [part for part in (self._states, self._head) if part is not None]

    def put(self, rows: Sequence[int], found: RecordingPass, logits: Tensor | None) -> None:
        """Stores a batch. `logits` [B, K] are those of the model's own head, where the plan has them."""
        states = [found.states[state] for state in self.plan.states]
        head = [value for value in (found.head_of(logits),) if value is not None]
        for part, values in ((self._states, states), (self._head, head)):
            if part is not None:
                # copied, not stacked: autocast on a CPU stacks no float16
                kept = torch.empty(len(values), *values[0].shape, dtype=part.dtype)  # [C, B, n, d]
                for stored, value in zip(kept, values, strict=True):
                    stored.copy_(value)
                if not kept.isfinite().all():
                    raise OverflowError(f"states are not finite in {str(part.dtype).removeprefix('torch.')}")
                for b, row in enumerate(rows):
                    part.put(row, kept[:, b, : part.counts[row]])

    def answer(
        self, model: Any, config: BadgeConfig, running: EarlyExitPass, rows: Tensor, inputs: dict[str, Any]
    ) -> SequenceClassifierOutput:
        """Hands the readers of `running`, a pass that has not begun, what one over these `rows` [B] would, and gives
        what the base model returns."""
        numbers = [self._number(row) for row in rows.tolist()]
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        (reader,) = running.readers
        length = mask.shape[1]
        if self.plan.positions != "all":
            length, reader.pooling = 1, Pooling("cls", None)
        if self._states is not None:
            # on a GPU the states travel as they are stored, and become wide there
            wide = torch.float32 if ids.device.type == "cpu" else self._states.dtype
            kept = self._states.batch(numbers, length, wide).to(ids.device)
            states = dict(zip(self.plan.states, kept, strict=True))
            for m, fields in reads_of(config, model.layout, model.num_blocks).items():
                frame = frame_of({name: states[state].to(self._types[state]) for name, state in fields.items()})
                running.read(model.block_at(m), m, frame.block_input, frame)
        if config.final_exit == "exit" or self._head is None:
            return SequenceClassifierOutput()
        length = mask.shape[1] if self.plan.head in _EVERY_TOKEN else 1
        kept = self._head.batch(numbers, length, self._head_type)[0].to(ids.device)
        if self.plan.head in ("logits", "token_logits"):
            return SequenceClassifierOutput(logits=kept[:, 0] if self.plan.head == "logits" else kept)
        if self.plan.head == "first":  # the head sees no other position, so there are no others
            inputs = {"input_ids": ids[:, :1], "attention_mask": mask[:, :1]}
        with HeadPass(kept, model.num_blocks, self._tuple_length):
            return model.model(return_dict=True, **inputs)


def texts_of(rows: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """What tells the text of each row, without its padding, from others."""
    found = []
    for row in rows:
        mask = row.get("attention_mask")
        real = slice(None) if mask is None else np.asarray(mask) != 0
        parts = [np.asarray(row[name], dtype=np.int64)[real].tobytes() for name in _TEXT if row.get(name) is not None]
        found.append(hashlib.blake2b(b"".join(parts), digest_size=12).digest())
    return found
