"""What belongs to one call: the pass, found through a ContextVar, and the frame of the block that runs now.

Nothing of a call is stored on modules, so threads can share a model, `deepcopy` works, and no graph outlives its call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor, nn

from badge_peft.tuner.architectures import BlockLayout

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Frame:
    """What one block sees while it runs, in the names of Eq. 2. All tensors are [B, S, d]."""

    attention_sum: Tensor | None = None  # the input of the attention LayerNorm
    attention: Tensor | None = None  # H_{m,MHA}
    ffn_sum: Tensor | None = None  # H_{m,F}
    scale_weights: Callable[[Tensor], Tensor] | None = None  # for weights of the block that an exit uses

    def __init__(self, block_input: Tensor) -> None:
        self.block_input = block_input  # H_{m-1}
        self.output = block_input  # H_m, once the block is through

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


class PassContext:
    """One call of a model. Inside of `with`, its blocks ask it what to do."""

    frame: Frame | None = None  # of the block that runs now
    heads: Any = None  # `RowHeads` or `TaskHeads`, where several adapters answer at the model's own head

    def __enter__(self) -> PassContext:
        self._token: Token[PassContext | None] = _CURRENT.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _CURRENT.reset(self._token)

    def visit(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `block`, a `BadgeBlock`, returns for the arguments with which the model called it."""
        raise NotImplementedError  # by `BlockPass`


_CURRENT: ContextVar[PassContext | None] = ContextVar("badge_peft_pass", default=None)

#: The pass that this thread's call belongs to, None outside of one. (The variable's own method: blocks and hooks ask
#: it dozens of times a call.)
current_pass: Callable[[], PassContext | None] = _CURRENT.get


@contextmanager
def no_pass() -> Iterator[None]:
    """Inside, blocks do what the base model's do, also where the call of another model is under way."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Recorder:
    """A hook that records, in the frame of the running block, a tensor that a norm sees: its output as a forward hook,
    its input as a pre-hook. Outside of a pass it does nothing.

    Compiled code (`badge_peft.compile_blocks`) cannot look for the pass, so there the tensor is kept in `seen` until
    the compiled function returns it; it never stays there.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # of the tensor, as in `Frame`
        self.seen: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | None = None) -> None:
        """Records the tensor, or the next chunk of the sequence."""
        value = args[0] if output is None else output
        if torch.compiler.is_dynamo_compiling():
            self.seen = value if self.seen is None else torch.cat([self.seen, value], dim=1)
            return
        run = current_pass()
        if run is not None and run.frame is not None:
            run.frame.record(self.name, value)


def watch_block(
    block: nn.Module, layout: BlockLayout, placement: str, handles: dict[str, Any], recorders: dict[str, Recorder]
) -> None:
    """Puts the hooks on `block` that a placement needs and `handles` lacks."""
    after = placement == "ffn" and not layout.pre_norm  # reads what the norm gives
    wanted = [("ffn_sum", layout.last_norm)] if layout.last_norm else []
    if placement in ("ffn", "mhsa"):
        wanted.append(("attention" if after or layout.pre_norm else "attention_sum", layout.attention_norm))
    for name, path in wanted:
        if name not in handles:
            norm = block.get_submodule(path)
            watches = after and name == "attention"
            register: Any = norm.register_forward_hook if watches else norm.register_forward_pre_hook
            recorders[name] = Recorder(name)
            handles[name] = register(recorders[name])


class BlockPass(PassContext):
    """One call of a model whose blocks are wrapped. Subclasses say in `visit` what happens at each block.
    `trains_backbone` says whether the blocks take gradients, and is asked only where these would get lost."""

    def __init__(self, compiled: Any = None, trains_backbone: Callable[[], bool] = lambda: True) -> None:
        self.compiled = compiled
        self.trains_backbone = trains_backbone
        self._visits: dict[int, int] = {}

    def number_of(self, block: Any) -> int:
        """The block number of this visit: a shared block (ALBERT) has a new one each time."""
        if len(block.numbers) == 1:
            return block.numbers[0]
        visit = self._visits.get(id(block), 0)
        self._visits[id(block)] = visit + 1
        return block.numbers[visit]

    def run_block(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Frame]:
        """Runs `block`, a `BadgeBlock`: what it returns, untouched, and what it saw on the way."""
        hidden = get_hidden_states(args, kwargs)
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
                if any(getattr(frame, recorder.name) is None for recorder in recorders):
                    # where foreign hooks break the graph, torch takes the code of a block without recorders for this
                    result = layer(*args, **kwargs)
        finally:
            self.frame = None
        frame.output = result[0] if isinstance(result, tuple) else result
        if frame.block_input.device != frame.output.device:  # a block on another device moves its input by itself
            frame.block_input = frame.block_input.to(frame.output.device)
        if torch.is_grad_enabled():
            self._check_gradient(layer, frame)
        return result, frame

    def _check_gradient(self, layer: nn.Module, frame: Frame) -> None:
        if frame.output.requires_grad:
            inner = (getattr(frame, name) for name in ("attention_sum", "attention", "ffn_sum"))
            hidden = any(x is not None and not x.requires_grad for x in inner) and self.trains_backbone()
        else:  # where the block's input has no gradient, its output has none either, whatever is trained inside
            hidden = any(parameter.requires_grad for parameter in layer.parameters())
        if hidden:
            raise RuntimeError(
                "re-entrant gradient checkpointing hides what a block computes, so its exit could not send gradients "
                "into it. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


def get_hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """H_{m-1} [B, S, d] among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def with_states(states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a block with other states."""
    if args:
        return (states, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": states}


def as_result(hidden: Tensor, tuple_length: int) -> Any:
    """`hidden` in the shape in which a block returns its states: a tuple of this length, 0 for the tensor itself."""
    return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden
