"""Cuts a model into the pieces that an early-exit graph is put together from: one for the embeddings, one per block.

The Hugging Face layer loop stays in control here, too. Each piece runs the whole model under a run of its own that
hands the states through all blocks but the one that is wanted, which works on states that come from outside. What lies
between two blocks (a convolution, say) belongs to the piece in front of it, and whatever a piece computes and nobody
reads falls away in the export.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from badge_peft.model import BadgeModel
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.run import ExitRun, Frame

EXAMPLE = (2, 7)  # rows and positions of the example that is traced; the second set tells the sizes that follow them
OTHER = (3, 9)


@dataclass
class Shared:
    """Tensors that the model computes before its blocks and hands to them: masks, rotary tables, position biases.

    Args:
        tensors: Each one once, in the order in which the blocks ask for them.
        indices: Per block, for each tensor among its arguments (behind the states), its place in `tensors`.
    """

    tensors: list[Tensor] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)

    def add(self, leaves: list[Any]) -> None:
        """Notes the arguments of the next block."""
        found = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue
            same = [i for i, known in enumerate(self.tensors) if known is leaf]
            if not same:
                self.tensors.append(leaf)
            found.append(same[0] if same else len(self.tensors) - 1)
        self.indices.append(found)


class _Recording(ExitRun):
    """Runs every block, and notes in what shape each returns its states."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lengths: list[int] = []

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().visit(block, args, kwargs)
        self.lengths.append(len(result) if isinstance(result, tuple) else 0)
        return result


def result_lengths(badge: BadgeModel, inputs: dict[str, Tensor]) -> list[int]:
    """[M]: how many values each block returns as a tuple, the states first; 0 where it returns the states alone."""
    run = badge.new_run(_Recording, inputs["input_ids"].shape[0], inputs.get("attention_mask"))
    with run:
        badge.model(return_dict=True, **inputs)
    return cast(_Recording, run).lengths


class _PieceRun(ExitRun):
    """A run in which most blocks hand their states through.

    Args:
        lengths: [M], from `result_lengths`.
    """

    def __init__(self, *args: Any, lengths: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lengths = lengths

    def pass_on(self, number: int, hidden: Tensor) -> Any:
        """`hidden` as block `number` returns its states."""
        length = self.lengths[number - 1]
        return (hidden, *[None] * (length - 1)) if length else hidden


class _EmbeddingRun(_PieceRun):
    """Hands every block through, and notes what they were called with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = Shared()
        self.embeddings: Tensor | None = None

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self._number(block)
        hidden = self._hidden(args, kwargs)
        if number == 1:
            self.embeddings = hidden
            if block.has_exit(self.adapter, 0):
                self.exit_logits[0] = self._read(block, 0, Frame(hidden))
        self.shared.add(_leaves(args, kwargs)[0])
        return self.pass_on(number, hidden)


class _BlockRun(_PieceRun):
    """Runs block `wanted` alone, on `states` and `shared`, and notes what the block behind it is given."""

    def __init__(self, *args: Any, wanted: int, states: Tensor, shared: list[Tensor], read: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.wanted, self.states, self.shared, self.read = wanted, states, shared, read
        self.following: Tensor | None = None

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self._number(block)
        if number != self.wanted:
            hidden = self._hidden(args, kwargs)
            if number == self.wanted + 1:
                self.following = hidden
            return self.pass_on(number, hidden)
        args, kwargs = _with(self.states, iter(self.shared), args, kwargs)
        result, frame = self._run(block, self.states, args, kwargs)
        if self.read and block.has_exit(self.adapter, number):
            self.following = frame.output  # block M with an exit of its own: nothing of the model follows
            self.exit_logits[number] = self._read(block, number, frame)
        return result


class Embeddings(nn.Module):
    """The piece before block 1: the model's inputs -> states [B, S, d], shared tensors, exit 0 where it is read.

    Args:
        badge: The model.
        lengths: [M], from `result_lengths`.
        read: Whether the answer of exit 0 is wanted.
    """

    def __init__(self, badge: BadgeModel, lengths: list[int], read: bool) -> None:
        super().__init__()
        self.badge = badge
        self.lengths = lengths
        self.read = read

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The tensors of `named`, in order: exporters know no names."""
        return tuple(self.named(inputs).values())

    def named(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`hidden`, `shared_0` ..., `logits` and `doubt` of exit 0."""
        run = self.run(inputs)
        assert run.embeddings is not None
        named = {"hidden": run.embeddings}
        named |= {f"shared_{i}": tensor.clone() for i, tensor in enumerate(run.shared.tensors)}
        return named | (_answers(run, 0) if self.read else {})

    def run(self, inputs: dict[str, Tensor]) -> _EmbeddingRun:
        """The call, with what the blocks were called with."""
        run = self.badge.new_run(
            _EmbeddingRun, inputs["input_ids"].shape[0], inputs.get("attention_mask"), lengths=self.lengths
        )
        with run:
            self.badge.model(return_dict=True, **inputs)
        return cast(_EmbeddingRun, run)


class Block(nn.Module):
    """The piece of block `number`, with its exit and what lies between it and the next block; block M has the rest of
    the model in its piece.

    Args:
        badge: The model.
        lengths: [M], from `result_lengths`.
        number: 1..M.
        read: Whether an answer is wanted here; otherwise only the states are.
    """

    def __init__(self, badge: BadgeModel, lengths: list[int], number: int, read: bool) -> None:
        super().__init__()
        self.badge = badge
        self.lengths = lengths
        self.number = number
        self.read = read

    def forward(self, hidden: Tensor, shared: list[Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The tensors of `named`, in order."""
        return tuple(self.named(hidden, shared, inputs).values())

    def named(self, hidden: Tensor, shared: list[Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`hidden` [B, S, d] (not where the model's own head answers), `logits` [B, K] and `doubt` [B]."""
        run = self.badge.new_run(
            _BlockRun,
            inputs["input_ids"].shape[0],
            inputs.get("attention_mask"),
            lengths=self.lengths,
            wanted=self.number,
            states=hidden,
            shared=shared,
            read=self.read,
        )
        with run:
            base = self.badge.model(return_dict=True, **inputs)
        if self.number == self.badge.num_blocks:
            run.exit_logits.setdefault(self.number, base.logits)
        named = {} if run.following is None else {"hidden": run.following}
        return named | (_answers(run, self.number) if self.read else {})


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
    states: Tensor, shared: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with other states and, tensor by tensor, with those of `shared`."""
    leaves, spec = _leaves(args, kwargs)
    filled = [next(shared) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    rest_args, rest_kwargs = pytree.tree_unflatten(filled, spec)
    if args:
        return (states, *rest_args), rest_kwargs
    return (), {**rest_kwargs, "hidden_states": states}


def _answers(run: ExitRun, number: int) -> dict[str, Tensor]:
    named = {"logits": run.exit_logits[number]}
    if number in run.doubts:
        named["doubt"] = run.doubts[number]
    return named
