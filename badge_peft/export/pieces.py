"""Cuts a model into the pieces that an early-exit graph is put together from: one for the embeddings, one per block.

The Hugging Face layer loop stays in control here, too. Each piece runs the whole model in a pass of its own that
passes the states through all blocks but the one that is wanted, which works on states that come from outside. What
lies between two blocks (a convolution, say) belongs to the piece before it, and whatever a piece computes and no
output needs falls away in the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from badge_peft.early_exit.full_depth import FullDepthReader
from badge_peft.early_exit.pass_ import as_result
from badge_peft.model import BadgeModel
from badge_peft.tuner.block_pass import BlockPass, states_of
from badge_peft.tuner.context import Frame
from badge_peft.tuner.layer import BadgeBlock

EXAMPLE = (2, 7)  # rows and positions of the example that is traced; the second set tells the sizes that follow them
OTHER = (3, 9)


class _RecordingPass(BlockPass):
    """Runs every block, and records in what shape each returns its states."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = self.run_block(block, args, kwargs)[0]
        self.lengths.append(len(result) if isinstance(result, tuple) else 0)
        return result


def result_lengths(badge: BadgeModel, inputs: dict[str, Tensor]) -> list[int]:
    """[M]: how many values each block returns as a tuple, the states first; 0 where it returns the states alone."""
    recording = _RecordingPass()
    with recording:
        badge.model(return_dict=True, **inputs)
    return recording.lengths


class PiecePass(BlockPass):
    """Runs block `wanted` alone (0: none), and passes the states through all others.

    Args:
        reader: Reads its exit.
        wanted: Its number.
        states: [B, S, d], its input.
        tensors: Those among its other arguments, in place of the model's own.
        lengths: [M], from `result_lengths`.
        read: Whether its exit is.

    Attributes:
        following: [B, S, d], the input of the next block.
        arguments: Of each block that did not run, the arguments beside the states, flat.
    """

    def __init__(
        self,
        reader: FullDepthReader,
        wanted: int,
        states: Tensor | None,
        tensors: Sequence[Tensor],
        lengths: list[int],
        read: bool,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.wanted, self.states, self.tensors, self.lengths, self.read = wanted, states, tensors, lengths, read
        self.following: Tensor | None = None
        self.arguments: list[list[Any]] = []

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self.number_of(block)
        if number == self.wanted:
            assert self.states is not None
            result, frame = self.run_block(block, *_with(self.states, iter(self.tensors), args, kwargs))
            self._read_exit(block, number, frame)
            return result
        hidden = states_of(args, kwargs)
        if number == self.wanted + 1:
            self.following = hidden
            if number == 1:
                self._read_exit(block, 0, Frame(hidden))
        self.arguments.append(_leaves(args, kwargs)[0])
        return as_result(hidden, self.lengths[number - 1])

    def _read_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        if self.read and block.has_exit(self.reader.exits.adapter, number):
            self.following = frame.output  # block M with an exit of its own: nothing of the model follows
            self.reader.at_exit(block, number, frame)


class ModelPiece(nn.Module):
    """One piece of a model: the embeddings, or a block with its exit and what lies between it and the next block.
    Block M has the rest of the model in its piece.

    Args:
        badge: The model, in eval mode.
        number: Of the block, 1..M; 0 is the embeddings.
        lengths: [M], from `result_lengths`.
        read: Whether the logits of its exit are wanted; otherwise only the states are.
    """

    def __init__(self, badge: BadgeModel, number: int, lengths: list[int], read: bool) -> None:
        super().__init__()
        self.badge, self.number, self.lengths, self.read = badge, number, lengths, read

    def forward(
        self, inputs: dict[str, Tensor], hidden: Tensor | None = None, tensors: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """The tensors of `named`, in order: exporters know no names."""
        return tuple(self.named(inputs, hidden, tensors).values())

    def named(
        self, inputs: dict[str, Tensor], hidden: Tensor | None = None, tensors: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Runs the piece.

        Args:
            inputs: Of the model.
            hidden: [B, S, d], the states before the block.
            tensors: What the block takes beside, in the order of its arguments.

        Returns:
            `hidden` [B, S, d] (not where the model's own head answers), `logits` [B, K] and `uncertainty` [B] of the
            exit; of the embeddings also `shared_0`, ..., what `shared_tensors` finds.
        """
        run = self.run(inputs, hidden, tensors)
        named = {} if run.following is None else {"hidden": run.following}
        if self.number == 0:
            named |= {f"shared_{i}": tensor.clone() for i, tensor in enumerate(shared_tensors(run.arguments)[0])}
        if self.read:
            named["logits"] = run.reader.exit_logits[self.number]
            if self.number in run.reader.exit_uncertainty:
                named["uncertainty"] = run.reader.exit_uncertainty[self.number]
        return named

    def run(
        self, inputs: dict[str, Tensor], hidden: Tensor | None = None, tensors: Sequence[Tensor] = ()
    ) -> PiecePass:
        """The call of `named`, with what the blocks were called with."""
        exits = self.badge.adapter_exits(self.badge.single_active_adapter())
        reader = FullDepthReader(exits, inputs["input_ids"].shape[0], inputs.get("attention_mask"))
        run = PiecePass(reader, self.number, hidden, tensors, self.lengths, self.read)
        with run:
            base = self.badge.model(return_dict=True, **inputs)
        if self.number == self.badge.num_blocks:
            reader.exit_logits.setdefault(self.number, base.logits)
        return run


def shared_tensors(arguments: list[list[Any]]) -> tuple[list[Tensor], list[list[int]]]:
    """What the model computes before its blocks and hands to them: masks, rotary tables, position biases.

    Args:
        arguments: Per block, its arguments beside the states, flat.

    Returns:
        The tensors, each one once, in the order in which the blocks ask for them; and per block the places of those
        that it takes.
    """
    tensors: dict[int, Tensor] = {}
    for leaf in (leaf for leaves in arguments for leaf in leaves if isinstance(leaf, Tensor)):
        tensors.setdefault(id(leaf), leaf)
    place = {key: i for i, key in enumerate(tensors)}
    return list(tensors.values()), [[place[id(x)] for x in leaves if isinstance(x, Tensor)] for leaves in arguments]


def example_inputs(names: list[str], size: tuple[int, int], vocabulary: int) -> dict[str, Tensor]:
    """Inputs of the model [B, S], with padding in the second row: masks that are all ones take short cuts."""
    rows, positions = size
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(min(5, vocabulary - 1), vocabulary, size, generator=generator)}
    mask = torch.ones(rows, positions, dtype=torch.long)
    mask[1, -2:] = 0
    inputs["attention_mask"] = mask
    if "token_type_ids" in names:
        inputs["token_type_ids"] = torch.zeros(rows, positions, dtype=torch.long)
    return inputs


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Everything a block was called with but its states, flat."""
    rest = (args[1:], kwargs) if args else (args, {k: v for k, v in kwargs.items() if k != "hidden_states"})
    return pytree.tree_flatten(rest)


def _with(
    states: Tensor, tensors: Iterator[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with other states and, tensor by tensor, with `tensors`."""
    leaves, spec = _leaves(args, kwargs)
    filled = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    rest_args, rest_kwargs = pytree.tree_unflatten(filled, spec)
    if args:
        return (states, *rest_args), rest_kwargs
    return (), {**rest_kwargs, "hidden_states": states}
