"""`BlockPass`: runs the blocks of a model one by one, and hands on what each of them computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from badge_peft.tuner.compiled import CompiledBlocks
from badge_peft.tuner.context import Frame, PassContext
from badge_peft.tuner.layer import BadgeBlock

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class BlockPass(PassContext):
    """One call of a model whose blocks are wrapped. Subclasses say in `visit` what happens at each block.

    Args:
        compiled: The compiled code of the blocks, where `compile_blocks` has been called.
        trains_backbone: Whether the blocks take gradients; asked only where these would get lost.
    """

    def __init__(
        self, compiled: CompiledBlocks | None = None, trains_backbone: Callable[[], bool] = lambda: True
    ) -> None:
        self.compiled = compiled
        self.trains_backbone = trains_backbone
        self._visits: dict[int, int] = {}

    def number_of(self, block: BadgeBlock) -> int:
        """The block number of this visit: a shared block (ALBERT) has a new one each time."""
        if len(block.numbers) == 1:
            return block.numbers[0]
        visit = self._visits.get(id(block), 0)
        self._visits[id(block)] = visit + 1
        return block.numbers[visit]

    def run_block(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Frame]:
        """Runs `block` with these arguments.

        Returns:
            What the block returns, untouched, and what it saw on the way.
        """
        hidden = states_of(args, kwargs)
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


def states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """H_{m-1} [B, S, d] among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def with_states(states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a block with other states."""
    if args:
        return (states, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": states}


def count_positions(*args: Any, **kwargs: Any) -> int:
    """S, from whatever the base model is called with, once `count_rows` has seen it."""
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    return int((args[0] if inputs is None else inputs).shape[1])


def count_rows(*args: Any, **kwargs: Any) -> int:
    """B, from whatever the base model is called with.

    Raises:
        ValueError: neither `input_ids` nor `inputs_embeds` is there, they have no rows and positions, or the batch is
            empty.
    """
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    if inputs is None and args:
        inputs = args[0]
    if inputs is None:
        raise ValueError("the model needs input_ids or inputs_embeds.")
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"inputs are {type(inputs).__name__}, and the model needs tensors: torch.tensor(...), or a tokenizer's "
            "return_tensors='pt'."
        )
    if inputs.dim() < 2:
        raise ValueError(
            f"inputs have shape {list(inputs.shape)}, and the model needs [batch, sequence]: unsqueeze(0) one text."
        )
    if inputs.shape[0] == 0 or inputs.shape[1] == 0:
        raise ValueError(f"the batch is empty: its inputs have shape {list(inputs.shape)}.")
    return int(inputs.shape[0])
