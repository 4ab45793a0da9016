"""The exits of many tasks at one block, read in one product.

One text has little to multiply, so that eight small exits in turn cost eight times what one costs, nearly all of it
calls. Stacked weights make one product of them. They are copies, kept beside the model, and made anew where a weight
has changed since. With many rows there is enough to multiply in each, and the exits are read one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.tuner.context import Frame
from badge_peft.tuner.exits import AdapterExits
from badge_peft.tuner.fast_path import PlainExit, plain_exit
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.pooling import Pooling

#: Rows times d (with mean pooling, times positions) above which exits are read one by one.
LARGEST = 16384
_KEPT = 64  # sets of stacks of one block module
#: The stack that an adapter's exit is in, None where no other is like it, and its place in that.
_Place = tuple["StackedExits | None", int]
#: Block -> (its number, adapters that may be asked) -> by the place of an adapter, where it is.
_STACKS: WeakKeyDictionary[BadgeBlock, dict[Any, dict[int, _Place]]] = WeakKeyDictionary()


class StackedExits:
    """Exits of like shape at one block: linear ones, each with a bypass.

    Args:
        exits: T of them.
    """

    def __init__(self, exits: Sequence[PlainExit]) -> None:
        self._parameters = [_parameters(e) for e in exits]
        self._versions = [[p._version for p in own] for own in self._parameters]
        self._kind = _kind(exits[0])
        first = exits[0]
        self.source: str = first.source or ""
        self.activation, self.norm = first.activation, first.norm
        self.labels = [e.linear.out_features for e in exits]
        with torch.inference_mode(False), torch.no_grad():  # plain tensors, for calls in either mode
            self.down = torch.stack([e.down.weight for e in exits])  # [T, r, d]
            self.down_bias = _stack([e.down.bias for e in exits])  # [T, r]
            self.up = torch.stack([e.up.weight.t() for e in exits])  # [T, r, d]
            self.up_bias = _stack([e.up.bias for e in exits])
            self.norm_weight = torch.stack([e.norm.weight for e in exits])  # [T, d]
            self.norm_bias = _stack([e.norm.bias for e in exits])
            widest = max(self.labels)
            padded = [(0, 0, 0, widest - k) for k in self.labels]
            self.weight = torch.stack([F.pad(e.linear.weight, p) for e, p in zip(exits, padded, strict=True)])
            self.bias = torch.stack([F.pad(e.linear.bias, p[2:]) for e, p in zip(exits, padded, strict=True)])
            self.weight = self.weight.transpose(1, 2).contiguous()  # [T, d, K]

    def fits(self, place: int, own: PlainExit) -> bool:
        """Whether the exit in this place is still `own`, with the same weights."""
        now, before = _parameters(own), self._parameters[place]
        same = len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
        return same and [p._version for p in now] == self._versions[place] and _kind(own) == self._kind

    def logits(self, frame: Frame, pre_norm: bool, pooling: Pooling, which: Sequence[int]) -> list[Tensor]:
        """Logits [n, K] of the exits `which`, in ascending order."""
        run = slice(which[0], which[-1] + 1)  # a view, where they lie side by side
        index = None if run.stop - run.start == len(which) else torch.tensor(which, device=self.down.device)

        def chosen(values: Any) -> Any:
            return None if values is None else values[run] if index is None else values.index_select(0, index)

        source = pooling.pick(getattr(frame, self.source))  # [n, d] or [n, S, d]
        residual: Any = frame.output if pre_norm else frame.ffn_sum
        residual = pooling.pick(residual)
        rows, size = source.shape[:-1], source.shape[-1]
        bias = chosen(self.down_bias)
        inner = F.linear(
            source.reshape(-1, size), chosen(self.down).flatten(0, 1), None if bias is None else bias.flatten()
        )
        if self.activation is not None:
            inner = self.activation(inner)
        inner = inner.unflatten(-1, (len(which), -1)).transpose(0, 1)  # [T, n, r]
        adjusted = torch.bmm(inner, chosen(self.up))  # [T, n, d]
        bias = chosen(self.up_bias)
        if bias is not None:
            adjusted.add_(bias.unsqueeze(1))
        adjusted.add_(residual.reshape(-1, size))  # B(.) + H_{m,F} (Eq. 1, 2)
        adjusted = F.layer_norm(adjusted, self.norm.normalized_shape, eps=self.norm.eps)
        adjusted.mul_(chosen(self.norm_weight).unsqueeze(1))
        bias = chosen(self.norm_bias)
        if bias is not None:
            adjusted.add_(bias.unsqueeze(1))
        vectors = pooling.reduce(adjusted.unflatten(1, rows))  # [T, n, d]
        found = torch.baddbmm(chosen(self.bias).unsqueeze(1), vectors, chosen(self.weight))  # [T, n, K]
        return [x[:, : self.labels[i]] for i, x in zip(which, found, strict=True)]


def read_stacked(
    block: BadgeBlock,
    number: int,
    frame: Frame,
    adapters: Sequence[AdapterExits],
    asking: Sequence[int],
    pooling: Pooling,
) -> dict[int, Tensor]:
    """Logits [n, K] of those exits `number` that can be read together, by the place of the adapter.

    Args:
        block: The block that has just run.
        number: Its number, not 0.
        frame: What it saw.
        adapters: All that might be asked at this block in the call, so that a stack serves however many still ask.
        asking: Places of those whose logits are wanted now, ascending.
        pooling: Of all of them.
    """
    states = pooling.pick(frame.output)
    if number == 0 or states.numel() > LARGEST or torch.is_autocast_enabled(states.device.type):
        return {}
    plain = {i: own for i in asking if (own := _stackable(block, number, frame, adapters[i])) is not None}
    key = (number, *(exits.adapter for exits in adapters))
    stacks = _STACKS.setdefault(block, {})
    found = stacks.get(key)
    if found is None or not all(i in found and _fits(found[i], own) for i, own in plain.items()):
        if len(stacks) >= _KEPT:
            stacks.clear()
        every = (_stackable(block, number, frame, exits) for exits in adapters)
        found = stacks[key] = _stack_alike({i: own for i, own in enumerate(every) if own is not None})
    together: dict[StackedExits, list[int]] = {}  # the adapters that are asked, in the order of their stack
    for i in plain:
        stack = found[i][0]
        if stack is not None:
            together.setdefault(stack, []).append(i)
    answers: dict[int, Tensor] = {}
    for stack, places in together.items():
        if len(places) > 1:
            logits = stack.logits(frame, block.layout.pre_norm, pooling, [found[i][1] for i in places])
            answers.update(zip(places, logits, strict=True))
    return answers


def _stack_alike(plain: dict[int, PlainExit]) -> dict[int, _Place]:
    """By the place of an adapter, where it is."""
    alike: dict[Any, list[int]] = {}
    for i, own in plain.items():
        alike.setdefault(_shape(own), []).append(i)
    found: dict[int, _Place] = {}
    for places in alike.values():
        stack = StackedExits([plain[i] for i in places]) if len(places) > 1 else None
        found.update({i: (stack, n) for n, i in enumerate(places)})
    return found


def _fits(place: _Place, own: PlainExit) -> bool:
    """Whether a stack still has the weights of the exit that is in this place of it."""
    stack, n = place
    return stack is None or stack.fits(n, own)


def _stackable(block: BadgeBlock, number: int, frame: Frame, exits: AdapterExits) -> PlainExit | None:
    if exits.are_linked or not block.has_exit(exits.adapter, number):
        return None
    bypass, norm = block.bypass_of(exits, number)
    placement, exit_ = block.badge_placement[exits.adapter], block.own_exit(exits.adapter, number)
    if exit_.linear.weight.is_inference():  # such a weight does not tell when it changes
        return None
    plain = plain_exit(exit_, bypass, placement, block.layout.pre_norm, norm, frame)
    return None if plain is None or plain.source is None or plain.dense is not None else plain


def _shape(plain: PlainExit) -> tuple[Any, ...]:
    """What exits that are stacked have in common."""
    norm, linear = plain.norm, plain.linear
    parts = (plain.down.out_features, plain.down.bias is None, plain.up.bias is None, norm.bias is None, norm.eps)
    return (plain.source, plain.activation, *parts, linear.bias is None, linear.weight.dtype)


def _kind(plain: PlainExit) -> tuple[Any, ...]:
    return plain.source, plain.activation, plain.norm.eps


def _parameters(own: PlainExit) -> list[Tensor]:
    modules = (own.down, own.up, own.norm, own.linear)
    return [p for module in modules for p in module._parameters.values() if p is not None]


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    return None if values[0] is None else torch.stack(list(values))  # type: ignore[arg-type]
