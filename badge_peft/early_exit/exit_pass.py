"""`EarlyExitPass`: one call of the model, whose blocks run for the rows that are still needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from badge_peft.early_exit.row_slice import ActiveRows
from badge_peft.tuner.context import BlockPass, Frame, get_hidden_states
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.saved_modules import answer_by_adapters


class AllRowsAnswered(Exception):
    """Ends a pass at the entry of a block that no row needs; neither it nor what is behind it runs."""


class EarlyExitPass(BlockPass):
    """The blocks of one call, and the readers that ask about its rows. A pass knows no policy.

    A row leaves when every reader that asks about it has its answer: at the next block only the other rows are handed
    on, without the padding that none of them needs, and when none is left the pass ends (`run`). Rows leave at the
    *entry* of a block, not at the exit, so that a model may still mix the states of all rows between two blocks. After
    block M the full batch is put together again for the model's own head. At full depth no row leaves.

    Several `readers` may ask about the same rows. Positions behind the last one that is not 0 in the mask [B, S] may
    be cut off, to a length that `round_up` gives.
    """

    def __init__(
        self,
        readers: Sequence[Any],
        batch_size: int,
        attention_mask: Tensor | None,
        num_blocks: int,
        round_up: Callable[[int], int] = int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.readers = list(readers)
        self.batch_size = batch_size
        self.num_blocks = num_blocks
        self.active_rows = ActiveRows(batch_size, attention_mask, round_up)
        self._spans = [(reader.first, reader.first + reader.rows) for reader in readers]  # in the states
        self._has_active = True
        self._may_end = False  # whether nothing behind the last block that a row needs has to run

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Calls the base model: what it returns, None where all rows had their answers before its end."""
        self._may_end = not _is_watched(model)
        try:
            with self:
                return model(return_dict=True, **inputs)
        except AllRowsAnswered:
            return None

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block` for the rows that are still needed, and has its exits read."""
        number = self.number_of(block)
        hidden = get_hidden_states(args, kwargs)
        if number == 1:
            check_rows(hidden, self.batch_size)
            self.read(block, 0, hidden, Frame(hidden))
        if not self._has_active:
            if self._may_end:
                raise AllRowsAnswered
        elif number > block.layout.full_rows_until and any(reader.has_answered for reader in self.readers):
            hidden = self._drop_answered(block, hidden, args, kwargs)
        if self.active_rows.part is not None:
            args, kwargs = self.active_rows.part.arguments(block, hidden, args, kwargs)
        result, frame = self.run_block(block, *self.before_block(number, args, kwargs))
        self.read(block, number, hidden, frame)
        if number == self.num_blocks:
            if self._may_end and not self._has_active:
                raise AllRowsAnswered
            if self.active_rows.part is not None:
                full = self.active_rows.part.restore(frame.output)
                return (full, *result[1:]) if isinstance(result, tuple) else full
        return result

    def before_block(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `number` is called with; training objectives may change it."""
        return args, kwargs

    def before_exit(self, number: int, block_input: Tensor, frame: Frame) -> Frame:
        """What exit `number` reads; training objectives may change it."""
        return frame

    def training_outputs(self) -> dict[str, Tensor]:
        """Further fields of `MultiExitOutput` that a training objective reads, with a row for each of the batch."""
        return {}

    def read(self, block: BadgeBlock, number: int, block_input: Tensor, frame: Frame) -> None:
        """Hands exit `number` of `block` to the readers that still ask."""
        frame = self.before_exit(number, block_input, frame)
        rows = len(self.active_rows.rows)
        active = False
        for reader, (start, end) in zip(self.readers, self._spans, strict=True):
            if reader.num_active:
                reader.on_exit(block, number, frame if end - start == rows else frame.rows(start, end))
                active = active or reader.num_active > 0
        self._has_active = active

    def _drop_answered(
        self, block: BadgeBlock, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The states of the rows that some reader still asks about."""
        needed = np.zeros(len(self.active_rows.rows), dtype=bool)
        for reader, (start, end) in zip(self.readers, self._spans, strict=True):
            needed[start:end] |= reader.is_active()
        kept = np.flatnonzero(needed)
        if len(kept) == len(needed):
            return hidden
        hidden, index = self.active_rows.keep(kept, block, hidden, args, kwargs)
        spans = []
        for reader, (start, end) in zip(self.readers, self._spans, strict=True):
            first, last = np.searchsorted(kept, (start, end))
            reader.keep_rows(kept[first:last] - start, index[first:last] - start, self.active_rows.length)
            spans.append((int(first), int(last)))
        self._spans = spans
        return hidden


def check_rows(hidden: Tensor, batch_size: int) -> None:
    """Refuses states [B, S, d] of block 1 that have lost their rows."""
    if hidden.dim() != 3 or hidden.shape[0] != batch_size:
        raise ValueError(
            f"block 1 got states of shape {list(hidden.shape)} for a batch of {batch_size}: the attention "
            "implementation has unpadded the batch into one row, and rows could not stop one by one. Load the "
            "model with attn_implementation='sdpa' (or 'eager')."
        )


def _is_watched(model: nn.Module) -> bool:
    """Whether a hook of somebody else's, or transformers, waits for what the model computes outside of its blocks."""
    recorded = (getattr(model.config, f"output_{name}", False) for name in ("hidden_states", "attentions"))
    if any(recorded):  # transformers 4.57 takes its recorders off at the end alone
        return True
    modules = [model]
    while modules:
        module = modules.pop()
        if isinstance(module, BadgeBlock):
            continue
        if module._forward_hooks and any(hook is not answer_by_adapters for hook in module._forward_hooks.values()):
            return True
        modules.extend(child for child in module._modules.values() if child is not None)
    return False
