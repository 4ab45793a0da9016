"""Cuts a model into the pieces that an early-exit graph is put together from: one for the embeddings, one per block.

The Hugging Face layer loop stays in control here, too. Each piece runs the whole model in a pass of its own that
passes the states through all blocks but the one that is wanted, which works on states that come from outside. What
lies between two blocks (a convolution, say) belongs to the piece before it, and whatever a piece computes and no
output needs falls away in the export.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from badge_peft.early_exit.readers import ExitReader, exit_reader
from badge_peft.model import BadgeModel
from badge_peft.tuner.context import BlockPass, Frame, as_result, get_hidden_states, with_states
from badge_peft.tuner.layer import BadgeBlock

EXAMPLE = (2, 7)  # rows and positions of the example that is traced; the second set tells the sizes that follow them
OTHER = (3, 9)
#: What a piece calls the states that go into the next block; those that come in are its input `hidden`.
FOLLOWING = "following"
#: Begin the names of what an exit leaves for the deeper ones (`ExitState.left`), and of what those before it left.
LEFT, BEFORE = "left_", "before_"


def tuple_lengths(badge: BadgeModel, inputs: dict[str, Tensor]) -> list[int]:
    """[M]: how many values each block returns as a tuple, the states first; 0 where it returns the states alone."""
    lengths: list[int] = []

    def note(block: nn.Module, args: Any, result: Any) -> None:
        lengths.append(len(result) if isinstance(result, tuple) else 0)

    hooks = [block.register_forward_hook(note) for block in badge.wrapped]
    badge.model(return_dict=True, **inputs)
    for hook in hooks:
        hook.remove()
    return lengths


class PiecePass(BlockPass):
    """Runs block `wanted` alone (0: none), and passes the states through all others.

    Args:
        reader: Reads its exit; None: nobody wants it.
        wanted: Its number.
        states: [B, S, d], its input.
        tensors: What the model computes before its blocks and hands to them (masks, rotary tables, position biases),
            to be taken in place of what it computes here.
        lengths: [M], from `tuple_lengths`.

    Attributes:
        following: [B, S, d], the input of the next block, or what the last one's own exit reads.
        answer: Logits [B, K] and uncertainty [B] (LTE) of the exit.
        shared: The tensors that blocks take beside the states, each one once, in the order in which they ask for them.
    """

    def __init__(
        self,
        reader: ExitReader | None,
        wanted: int,
        states: Tensor | None,
        tensors: Sequence[Tensor],
        lengths: list[int],
    ) -> None:
        super().__init__()
        self.reader, self.wanted, self.states, self.tensors, self.lengths = reader, wanted, states, tensors, lengths
        self.following: Tensor | None = None
        self.answer: tuple[Tensor, Tensor | None] | None = None
        self.shared: list[Tensor] = []

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, hidden = self.number_of(block), get_hidden_states(args, kwargs)
        beside = with_states(cast(Tensor, None), args, kwargs)
        places = {id(tensor): i for i, tensor in enumerate(self.shared)}
        for leaf in pytree.tree_leaves(beside):
            if isinstance(leaf, Tensor) and id(leaf) not in places:
                places[id(leaf)] = len(self.shared)
                self.shared.append(leaf)
        if number == self.wanted:
            assert self.states is not None
            given = pytree.tree_map_only(Tensor, lambda tensor: self.tensors[places[id(tensor)]], beside)
            result, frame = self.run_block(block, *with_states(self.states, *given))
            self._read_exit(block, number, frame)
            return result
        if number == self.wanted + 1:
            self.following = hidden
            if number == 1:
                self._read_exit(block, 0, Frame(hidden))
        return as_result(hidden, self.lengths[number - 1])

    def _read_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        if self.reader is not None and block.has_exit(self.reader.exits.adapter, number):
            self.following = frame.output  # block M with an exit of its own: nothing of the model follows
            self.answer = self.reader.read(block, number, frame)


class ModelPiece(nn.Module):
    """One piece of a model: the embeddings, or a block with its exit and what lies between it and the next block.
    Block M has the rest of the model in its piece.

    Args:
        badge: The model, in eval mode.
        number: Of the block, 1..M; 0 is the embeddings.
        lengths: [M], from `tuple_lengths`.
        read: Whether the logits of its exit are wanted; otherwise only the states are.
    """

    def __init__(self, badge: BadgeModel, number: int, lengths: list[int], read: bool) -> None:
        super().__init__()
        self.badge, self.number, self.lengths, self.read = badge, number, lengths, read

    def forward(
        self,
        inputs: dict[str, Tensor],
        hidden: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
        before: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Runs the piece.

        Args:
            inputs: Of the model.
            hidden: [B, S, d], the states before the block.
            shared: `shared_0`, ..., as the embeddings' piece gives them.
            before: `before_logits`, ..., what the exits before have left, [B, ...] or [B, S, ...].

        Returns:
            `following` [B, S, d] (not where the model's own head answers), `logits` [B, K], `uncertainty` [B] and
            `left_...` of the exit; of the embeddings also `shared_0`, ..., what the model computes before its blocks
            for them.
        """
        exits = self.badge.adapter_exits(self.badge.single_active_adapter())
        reader = exit_reader(self.badge, exits, inputs) if self.read else None
        if reader is not None:
            reader.state.left = {name.removeprefix(BEFORE): tensor for name, tensor in (before or {}).items()}
        run = PiecePass(reader, self.number, hidden, list((shared or {}).values()), self.lengths)
        with run:
            base = self.badge.model(return_dict=True, **inputs)
        named = {} if run.following is None else {FOLLOWING: run.following}
        if self.number == 0:
            named |= {f"shared_{i}": tensor.clone() for i, tensor in enumerate(run.shared)}
        if self.read:
            logits, uncertainty = run.answer or (base.logits, None)
            named["logits"] = logits
            if uncertainty is not None:
                named["uncertainty"] = uncertainty
        if reader is not None and run.answer is not None:
            named |= {LEFT + name: tensor.clone() for name, tensor in reader.state.left.items()}
        return named


def example_inputs(model: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """What the model's tokenizer makes for it [B, S], with padding in the second row: masks that are all ones take
    short cuts."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, size, generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs
