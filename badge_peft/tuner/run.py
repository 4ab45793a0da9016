"""`ExitRun`: everything that belongs to one call, found through a ContextVar.

Nothing of a call is stored on modules, so threads can share a model, `deepcopy` works, and no graph outlives its call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from badge_peft.tuner.fast_path import fused_logits, fused_vector
from badge_peft.tuner.notes import Notes
from badge_peft.tuner.pooling import Pooling

if TYPE_CHECKING:
    from badge_peft.compile import CompiledBlocks
    from badge_peft.tuner.layer import BadgeBlock

_CURRENT: ContextVar[ExitRun | None] = ContextVar("badge_peft_exit_run", default=None)


#: The run that this thread's call belongs to, None outside of one. (The variable's own method: blocks and hooks ask it
#: dozens of times a call.)
current_run: Callable[[], ExitRun | None] = _CURRENT.get


class Frame:
    """What one block sees while it runs; the names are those of DESIGN's equations. All tensors are [B, S, d]."""

    def __init__(self, block_input: Tensor) -> None:
        self.block_input = block_input  # H_{m-1}
        self.attention_sum: Tensor | None = None  # the input of the attention LayerNorm
        self.attention: Tensor | None = None  # H_{m,MHA}
        self.ffn_sum: Tensor | None = None  # H_{m,F}
        self.output: Tensor = block_input  # H_m, once the block is through
        self.scale_weights: Callable[[Tensor], Tensor] | None = None  # for weights of the block that an exit uses

    def record(self, name: str, value: Tensor) -> None:
        """Stores `value`; a second one is the next chunk of the sequence (`chunk_size_feed_forward`), or, when all of
        it is there, what counts: an adapter of the adapters library has its block's norm run before it and after."""
        before = getattr(self, name)
        whole = before is None or before.shape[1] == self.block_input.shape[1]
        setattr(self, name, value if whole else torch.cat([before, value], dim=1))

    def rows(self, start: int, end: int) -> Frame:
        """The same for the rows from `start` up to `end` alone; views, nothing is copied."""
        part = Frame(self.block_input[start:end])
        part.output = self.output[start:end]
        part.scale_weights = self.scale_weights
        for name in ("attention_sum", "attention", "ffn_sum"):
            value = getattr(self, name)
            if value is not None:
                setattr(part, name, value[start:end])
        return part


class ExitRun:
    """One full-depth call: every block runs, every exit's logits are collected.

    Args:
        adapter: Name of the adapter whose exits are read.
        batch_size: Rows of the call, B.
        attention_mask: [B, S] or None, for the pooling.
        pooling: `cls`, `mean` or `last`.
        exits: The adapter's own exits by block number, shallow to deep, where they need one another.
        learn_to_exit: The layer of LTE, where the adapter has one.
        exit_layers: Block numbers of all exits; the last is M.

    Attributes:
        exit_logits: Block number -> [B, K], of the exits that have been computed.
        doubts: Block number -> [B], the uncertainty that a learned exit layer predicts, where the adapter has one.
    """

    keep_notes = False

    def __init__(
        self,
        adapter: str,
        batch_size: int,
        attention_mask: Tensor | None,
        pooling: str,
        exits: dict[int, nn.Module] | None = None,
        learn_to_exit: nn.Module | None = None,
        *,
        exit_layers: list[int] | None = None,
    ) -> None:
        if attention_mask is not None and attention_mask.dim() != 2 and pooling != "cls":
            raise ValueError(
                f"exit_pooling={pooling!r} needs an attention_mask of shape [batch, sequence], got "
                f"{list(attention_mask.shape)}."
            )
        self.adapter = adapter
        self.batch_size = batch_size
        self.pooling = Pooling(pooling, attention_mask)
        self.exit_logits: dict[int, Tensor] = {}
        self.doubts: dict[int, Tensor] = {}
        self.exits = exits or {}
        self.exit_layers = exit_layers or []
        self.learn_to_exit = learn_to_exit
        self.notes = Notes(list(self.exits.values()), keep=self.keep_notes)
        self.frame: Frame | None = None
        self.compiled: CompiledBlocks | None = None
        self.shares: list[tuple[str, int]] | None = None  # adapters and their rows in turn, where there are several
        self.trains_backbone: Callable[[], bool] = lambda: True  # asked only where gradients would get lost
        self._visits: dict[int, int] = {}
        self._token: Token[ExitRun | None] | None = None

    def __enter__(self) -> ExitRun:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block` as the model called it and reads its exit. Returns what the block returns, untouched."""
        number = self._number(block)
        hidden = self._hidden(args, kwargs)
        if number == 1:
            self._check_rows(hidden)
            if block.has_exit(self.adapter, 0):
                self.exit_logits[0] = self._read(block, 0, self.before_exit(0, hidden, Frame(hidden)))
        args, kwargs = self.before_block(number, args, kwargs)
        result, frame = self._run(block, self._hidden(args, kwargs), args, kwargs)
        if block.has_exit(self.adapter, number):
            self.exit_logits[number] = self._read(block, number, self.before_exit(number, hidden, frame))
        return result

    def before_block(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `number` is called with; training objectives may change it."""
        return args, kwargs

    def before_exit(self, number: int, block_input: Tensor, frame: Frame) -> Frame:
        """What exit `number` reads; training objectives may change it."""
        return frame

    def _read(self, block: BadgeBlock, number: int, frame: Frame) -> Tensor:
        """Logits [B, K] of exit `number`; its doubt and its notes are kept on the way."""
        fused = fused_vector(block, self.adapter, number, frame, self.pooling)
        if fused is None:
            exit_, vector = block.represent(self.adapter, number, frame, self.pooling)
        else:
            exit_, vector = block.own_exit(self.adapter, number), fused
        self.notes.keep_vector(exit_, vector)
        if self.learn_to_exit is not None:
            self.doubts[number] = self.learn_to_exit(vector).sigmoid().squeeze(-1)
        return exit_(vector, self.notes) if fused is None else fused_logits(exit_, vector)

    def _number(self, block: BadgeBlock) -> int:
        """The block number of this visit: a shared block (ALBERT) has a new one each time."""
        if len(block.numbers) == 1:
            return block.numbers[0]
        visit = self._visits.get(id(block), 0)
        self._visits[id(block)] = visit + 1
        return block.numbers[visit]

    def _run(
        self, block: BadgeBlock, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Frame]:
        frame = self.frame = Frame(hidden)
        layer: Any = block._modules["base_layer"]
        try:
            if self.compiled is None or torch.is_grad_enabled():
                result = layer(*args, **kwargs)
            else:
                recorders = list(block.recorders.values())
                result, seen = self.compiled.run(layer, recorders, hidden.shape[1], args, kwargs)
                for recorder, value in zip(recorders, seen, strict=False):
                    if value is not None:
                        frame.record(recorder.name, value)
        finally:
            self.frame = None
        frame.output = result[0] if isinstance(result, tuple) else result
        if torch.is_grad_enabled() and frame.output.requires_grad:
            self._check_gradient(frame)
        return result, frame

    def _check_gradient(self, frame: Frame) -> None:
        for name in ("attention_sum", "attention", "ffn_sum"):
            value = getattr(frame, name)
            if value is not None and not value.requires_grad and self.trains_backbone():
                raise RuntimeError(
                    "re-entrant gradient checkpointing hides what a block computes, so its exit could not send "
                    "gradients into it. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
                )

    @staticmethod
    def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def _check_rows(self, hidden: Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[0] != self.batch_size:
            raise ValueError(
                f"block 1 got states of shape {list(hidden.shape)} for a batch of {self.batch_size}: the attention "
                "implementation has unpadded the batch into one row, and rows could not stop one by one. Load the "
                "model with attn_implementation='sdpa' (or 'eager')."
            )
