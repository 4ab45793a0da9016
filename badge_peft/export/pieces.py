"""Cuts a model into the pieces that an early-exit graph is put together from: one for the embeddings, one per block.

The Hugging Face layer loop stays in control here, too. Each piece runs the whole model in a pass of its own that
passes the states through all blocks but the one that is wanted, which works on states that come from outside. What
lies between two blocks (a convolution, say) belongs to the piece before it, and whatever a piece computes and no
output needs falls away in the export.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from badge_peft.early_exit.readers import ExitReader, exit_reader
from badge_peft.export.task_stacks import ExportedStack, side_by_side, stacks_of
from badge_peft.model import BadgeModel
from badge_peft.tuner.context import BlockPass, Frame, as_result, get_hidden_states, with_states
from badge_peft.tuner.exits import build_on
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.saved_modules import TaskHeads

EXAMPLE = (2, 7)  # rows and positions of the example that is traced; the second set tells the sizes that follow them
OTHER = (3, 9)
#: What a piece calls the states that go into the next block; those that come in are its input `hidden`.
FOLLOWING = "following"
#: Begin the names of what an exit leaves for the deeper ones (`ExitState.left`), and of what those before it left.
LEFT, BEFORE = "left_", "before_"
#: The task of a file that has one, the active adapter's: what belongs to it has no name in front.
ALONE = ""


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
    """Runs block `wanted` alone (0: none), on `states` [B, S, d] and `tensors`, and passes the states through all
    others. `tensors` are what the model computes before its blocks and hands to them (masks, rotary tables, position
    biases), to be taken in place of what it computes here; `readers`, by task, read its exit, together in `stacks`
    (None: they are made now)."""

    def __init__(
        self,
        readers: Mapping[str, ExitReader],
        stacks: Sequence[ExportedStack] | None,
        wanted: int,
        states: Tensor | None,
        tensors: Sequence[Tensor],
        lengths: list[int],
    ) -> None:
        super().__init__()
        self.readers, self.stacks, self.wanted = readers, stacks, wanted
        self.states, self.tensors, self.lengths = states, tensors, lengths
        self.following: Tensor | None = None  # [B, S, d], the next block's input, or what the last one's exit reads
        self.logits: list[tuple[list[str], Tensor]] = []  # tasks, and those of their exits, [T, n, K]; [n, K] of one
        self.uncertainty: dict[str, Tensor] = {}  # by task, [n] (LTE)
        self.shared: list[Tensor] = []  # what blocks take beside the states, each once, in the order of asking

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
            self._read_exits(block, number, frame)
            return result
        if number == self.wanted + 1:
            self.following = hidden
            if number == 1:
                self._read_exits(block, 0, Frame(hidden))
        return as_result(hidden, self.lengths[number - 1])

    def _read_exits(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        readers = {task: r for task, r in self.readers.items() if block.has_exit(r.exits.adapter, number)}
        if not readers:
            return
        self.following = frame.output  # block M with an exit of its own: nothing of the model follows
        if self.stacks is None:
            self.stacks = stacks_of(block, number, frame, readers)
        for stack in self.stacks:
            own = {task: readers.pop(task) for task in stack.tasks}
            found = stack(frame, own[stack.tasks[0]].pooling)
            if all(reader.exits.carry is None for reader in own.values()):
                self.logits.append((stack.tasks, found))
                continue
            for i, (task, reader) in enumerate(own.items()):
                exits, exit_ = reader.exits, block.own_exit(reader.exits.adapter, number)
                logits = build_on(exits, exit_, found[i, :, : exits.num_labels], reader.state)
                self.logits.append(([task], logits))
        for task, reader in readers.items():
            logits, uncertainty = reader.read(block, number, frame)
            self.logits.append(([task], logits))
            if uncertainty is not None:
                self.uncertainty[task] = uncertainty


class ModelPiece(nn.Module):
    """One piece of a model in eval mode: the embeddings (0), or a block with its exits and what lies between it and
    the next block. Block M has the rest of the model in its piece. `lengths` are from `tuple_lengths`; `read` are, by
    group of tasks (as `TaskGroup` has them), the block numbers of the exits whose logits are wanted."""

    def __init__(
        self, badge: BadgeModel, number: int, lengths: list[int], read: Mapping[tuple[str, ...], Collection[int]]
    ) -> None:
        super().__init__()
        self.badge, self.number, self.lengths = badge, number, lengths
        self.inner = inner_names(read)
        self.groups = [group for group, numbers in read.items() if number in numbers]
        self.read = bool(self.groups)
        self.stacks: nn.ModuleList | None = None  # made in the first call, which must not be one that is traced

    def forward(
        self,
        inputs: dict[str, Tensor],
        hidden: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
        before: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Runs the piece on the states before the block, `hidden` [B, S, d], given `shared_0`, ... of the embeddings'
        piece and `before_logits`, ..., what the exits before have left, [B, ...] or [B, S, ...].

        Gives `following` [B, S, d] (not where the model's own head answers), `logits` [B, K], `uncertainty` [B] and
        `left_...` of the exit; of the embeddings also `shared_0`, ..., what the model computes before its blocks for
        them. Of many tasks all but the first have an inner name in front: `task0.logits`, of a group of T > 1 tasks,
        whose first it is, [B, T, K], and `left_task0.logits`.
        """
        exits = {task: adapter_exits(self.badge, task) for group in self.groups for task in group}
        readers = {task: exit_reader(self.badge, own, inputs) for task, own in exits.items()}
        for task, reader in readers.items():
            prefix = BEFORE + self.inner[task]
            reader.state.left = {k.removeprefix(prefix): x for k, x in (before or {}).items() if k.startswith(prefix)}
        stacks: Any = self.stacks
        run = PiecePass(readers, stacks, self.number, hidden, list((shared or {}).values()), self.lengths)
        last = self.number == self.badge.num_blocks
        at_head = [task for task, own in exits.items() if last and not own.has_final_exit]
        if ALONE not in exits:
            run.heads = TaskHeads(dict.fromkeys(at_head, lambda: True), self._last_head())
        with run:
            base = self.badge.model(return_dict=True, **inputs)
        if self.stacks is None:
            self.stacks = nn.ModuleList(run.stacks or [])
        named = {} if run.following is None else {FOLLOWING: run.following}
        if self.number == 0:
            named |= {f"shared_{i}": tensor.clone() for i, tensor in enumerate(run.shared)}
        if run.heads is None:
            run.logits += [(at_head, base.logits)] if at_head else []
        else:
            own_logits = run.heads.logits(base.logits).items()
            run.logits += [([task], logits[..., : exits[task].num_labels]) for task, logits in own_logits]
        for group in self.groups:
            prefix, labels = self.inner[group[0]], max(exits[task].num_labels for task in group)
            named[f"{prefix}logits"] = side_by_side(run.logits, group, labels)
            if group[0] in run.uncertainty:
                named[f"{prefix}uncertainty"] = run.uncertainty[group[0]]
        for task, reader in readers.items():
            if task not in at_head:
                named |= {f"{LEFT}{self.inner[task]}{k}": x.clone() for k, x in reader.state.left.items()}
        return named

    def _last_head(self) -> nn.Module | None:
        head = self.badge.layout.head
        return getattr(self.badge.model, head[-1], None) if head else None


def adapter_exits(badge: BadgeModel, task: str) -> Any:
    """The exits of a task, whose adapter has its name; of a file of one, those of the active adapter."""
    return badge.adapter_exits(badge.single_active_adapter() if task == ALONE else task)


def inner_names(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """What stands in front of the names of what belongs to a task inside of the graph: a number, as a user's names
    might be those of something else."""
    tasks = [task for group in groups for task in group]
    return {task: "" if task == ALONE else f"task{i}." for i, task in enumerate(tasks)}


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
