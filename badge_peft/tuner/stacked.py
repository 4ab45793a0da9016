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

from badge_peft.tuner.carry import CarriedLogits
from badge_peft.tuner.context import Frame
from badge_peft.tuner.exits import AdapterExits
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.plain_exit import PlainExit, is_changed, plain_exit
from badge_peft.tuner.pooling import Pooling
from badge_peft.tuner.watched import Watched

#: Rows times d (with mean pooling, times positions) above which exits are read one by one.
LARGEST = 16384
#: Logits of labels that an exit lacks, beside others that have them: as good as impossible.
MISSING = -1e30
_KEPT = 64  # sets of stacks of one block module
#: Block -> (its number, adapters that may be asked) -> their stacks.
_STACKS: WeakKeyDictionary[BadgeBlock, dict[Any, BlockStacks]] = WeakKeyDictionary()


class StackedExits:
    """Exits of like shape at one block: linear ones, each with a bypass. The weights of LN' are folded into those of
    the linear layer behind it: (n w + b) W + c = n (w W) + (b W + c).

    Args:
        exits: T of them.
    """

    def __init__(self, exits: Sequence[PlainExit]) -> None:
        first = exits[0]
        self.reads, self.activation, self.norm = first.reads, first.activation, first.norm
        self.labels = [e.linear.out_features for e in exits]
        self.parts: dict[tuple[int, ...], tuple[Any, ...]] = {}
        with torch.inference_mode(False), torch.no_grad():  # plain tensors, for calls in either mode
            self.down = torch.stack([e.down.weight for e in exits])  # [T, r, d]
            self.down_bias = _stack([e.down.bias for e in exits])  # [T, r]
            self.up = torch.stack([e.up.weight.t() for e in exits])  # [T, r, d]
            self.up_bias = _stack([e.up.bias for e in exits])  # [T, d]
            widest = max(self.labels)
            padded = [(0, 0, 0, widest - k) for k in self.labels]
            weight = torch.stack([F.pad(e.linear.weight, p) for e, p in zip(exits, padded, strict=True)])
            self.weight = (
                (weight * torch.stack([e.norm.weight for e in exits]).unsqueeze(1)).transpose(1, 2).contiguous()
            )
            missing = max(MISSING, torch.finfo(weight.dtype).min)
            biases = [F.pad(e.linear.bias, p[2:], value=missing) for e, p in zip(exits, padded, strict=True)]
            self.bias = torch.stack(biases)  # [T, K]; of LN' apart, [T, K] too
            shift = _stack([e.norm.bias for e in exits])
            self.shift = None if shift is None else torch.bmm(weight, shift.unsqueeze(-1)).squeeze(-1)
            self.whole = self.bias if self.shift is None else self.bias + self.shift

    def fits(self, frame: Frame) -> bool:
        """Whether the block has given what these exits read, in their precision."""
        source, residual = (getattr(frame, name) for name in self.reads)
        return source is not None and residual is not None and source.dtype == residual.dtype == self.weight.dtype

    def logits(self, frame: Frame, pooling: Pooling, which: Sequence[int]) -> Tensor:
        """Logits [T', n, K] of the T' exits `which`, in ascending order; of labels that an exit lacks, `MISSING`."""
        down, down_bias, up, up_bias, weight, bias, shift, whole = self.weights(tuple(which))
        source, residual = (pooling.pick(getattr(frame, name)) for name in self.reads)  # [n, d] or [n, S, d]
        rows, size = source.shape[:-1], source.shape[-1]
        if len(rows) > 1:
            source, residual = source.reshape(-1, size), residual.reshape(-1, size)
        inner = F.linear(source, down, down_bias)
        if self.activation is not None:
            inner = self.activation(inner)
        inner = inner.view(-1, len(which), up.shape[1]).transpose(0, 1)  # [T, n, r]
        adjusted = torch.bmm(inner, up) if up_bias is None else torch.baddbmm(up_bias, inner, up)  # [T, n, d]
        adjusted += residual  # B(.) + H_{m,F} (Eq. 1, 2)
        normal = torch.layer_norm(adjusted, self.norm.normalized_shape, None, None, self.norm.eps)
        if pooling.kind != "mean":
            return torch.baddbmm(whole, normal, weight)  # [T, n, K]
        found = torch.baddbmm(bias, pooling.reduce(normal.unflatten(1, rows)), weight)
        if shift is None:
            return found
        total = pooling.weights(source.unflatten(0, rows)).sum(dim=1)  # [n]: 1; 0 for a row of nothing but padding
        return found + shift * total.unsqueeze(-1)

    def weights(self, which: tuple[int, ...]) -> tuple[Any, ...]:
        """The weights of these exits: of the bypasses' first layers [T' r, d] and biases [T' r], of all others
        [T', ...], biases as [T', 1, ...]."""
        found = self.parts.get(which)
        if found is None:
            parts: Any = [self.down, self.down_bias, self.up, self.up_bias, self.weight]
            parts += [self.bias, self.shift, self.whole]
            if len(which) < len(self.labels):
                run = slice(which[0], which[-1] + 1)  # a view, where they lie side by side
                index = run if run.stop - run.start == len(which) else list(which)
                with torch.inference_mode(False), torch.no_grad():
                    parts = [None if x is None else x[index] for x in parts]
            down, down_bias, up, up_bias, weight, *biases = parts
            with torch.inference_mode(False), torch.no_grad():
                found = (
                    down.flatten(0, 1),
                    None if down_bias is None else down_bias.flatten(),
                    up,
                    None if up_bias is None else up_bias.unsqueeze(1),
                    weight,
                    *(None if x is None else x.unsqueeze(1) for x in biases),
                )
            self.parts[which] = found
        return found


class BlockStacks:
    """The stacks of one block, for the adapters that a call may ask there.

    Args:
        block: The block that has just run.
        number: Its number.
        frame: What it saw.
        adapters: All that might be asked, so that a stack serves however many still ask.
    """

    def __init__(self, block: BadgeBlock, number: int, frame: Frame, adapters: Sequence[AdapterExits]) -> None:
        self.final_norms = [exits.final_norm for exits in adapters]
        self.watched = Watched()
        alike: dict[Any, list[int]] = {}
        plain: dict[int, PlainExit] = {}
        for i, exits in enumerate(adapters):
            own = stackable(block, number, frame, exits)
            if own is not None:
                plain[i] = own
                alike.setdefault(shape_of(own), []).append(i)
                _watch(self.watched, block, number, exits, own)
        #: By the place of an adapter: the stack that its exit is in, None where no other is like it, and where there.
        self.places: dict[int, tuple[StackedExits | None, int]] = {}
        for members in alike.values():
            stack = StackedExits([plain[i] for i in members]) if len(members) > 1 else None
            self.places.update({i: (stack, n) for n, i in enumerate(members)})

        self.others = [i for i in range(len(adapters)) if i not in self.places]

    def hold(
        self, block: BadgeBlock, number: int, frame: Frame, adapters: Sequence[AdapterExits], asking: Sequence[int]
    ) -> bool:
        """Whether they have the weights that the adapters have now, and no exit is left out that could be in them."""
        return (
            self.watched.holds()
            and [exits.final_norm for exits in adapters] == self.final_norms
            and not any(i in asking and stackable(block, number, frame, adapters[i]) is not None for i in self.others)
        )


def read_stacked(
    block: BadgeBlock,
    number: int,
    frame: Frame,
    adapters: Sequence[AdapterExits],
    asking: Sequence[int],
    pooling: Pooling,
) -> list[tuple[list[int], Tensor]]:
    """Those exits `number` that can be read together: the places of T' adapters each, and their logits [T', n, K].

    Args:
        block: The block that has just run.
        number: Its number.
        frame: What it saw.
        adapters: All that might be asked at this block in the call.
        asking: Places of those whose logits are wanted now, ascending.
        pooling: Of all of them.
    """
    if number == 0 or torch.is_grad_enabled() or frame.scale_weights is not None or torch.jit.is_tracing():
        return []
    states = frame.output
    size = states.numel() if pooling.kind == "mean" else states.shape[0] * states.shape[-1]
    if size > LARGEST or torch.is_autocast_enabled(states.device.type):
        return []
    key = (number, *[exits.adapter for exits in adapters])
    kept = _STACKS.setdefault(block, {})
    stacks = kept.get(key)
    if stacks is None or not stacks.hold(block, number, frame, adapters, asking):
        if len(kept) >= _KEPT:
            kept.clear()
        stacks = kept[key] = BlockStacks(block, number, frame, adapters)
    together: dict[StackedExits, list[int]] = {}  # the adapters that are asked, in the order of their stack
    for i in asking:
        stack, _ = stacks.places.get(i, (None, 0))
        if stack is not None:
            together.setdefault(stack, []).append(i)
    places = stacks.places
    return [
        (members, stack.logits(frame, pooling, [places[i][1] for i in members]))
        for stack, members in together.items()
        if len(members) > 1 and stack.fits(frame)
    ]


def stackable(block: BadgeBlock, number: int, frame: Frame, exits: AdapterExits) -> PlainExit | None:
    """The parts of exit `number` of an adapter, where it can be read beside others like it."""
    if exits.need_more_than_logits or not block.has_exit(exits.adapter, number):
        return None
    bypass, norm = block.bypass_of(exits, number)
    placement, exit_ = block.badge_placement[exits.adapter], block.own_exit(exits.adapter, number)
    if exit_.linear.weight.is_inference():  # such a weight does not tell when it changes
        return None
    carry = exit_.carry
    if carry is not None and (type(carry) is not CarriedLogits or is_changed(carry)):
        return None
    return plain_exit(exit_, bypass, placement, block.layout.pre_norm, norm, frame)


def _watch(watched: Watched, block: BadgeBlock, number: int, exits: AdapterExits, plain: PlainExit) -> None:
    """Watches whatever `stackable` looked at."""
    parts: Any = block._modules
    exit_, bypass = (
        watched.entry(watched.entry(parts[kind]._modules, exits.adapter)._modules, str(number))
        for kind in ("badge_exit", "badge_bypass")
    )
    watched.entry(block.badge_placement, exits.adapter)
    dropout = watched.entry(exit_._modules, "dropout")
    watched.entry(dropout.__dict__, "training")
    watched.entry(exit_._modules, "linear")
    carry = watched.entry(exit_._modules, "carry")
    for name in ("down", "up", "activation", "norm"):
        watched.entry(bypass._modules, name)
    own_norm = bypass._modules.get("norm")
    if own_norm is None and block.layout.last_norm is not None:
        watched.path(block, f"base_layer.{block.layout.last_norm}")
    modules = (exit_, dropout, carry, plain.linear, bypass, bypass.activation, plain.down, plain.up, own_norm)
    for module in modules:
        if module is not None:
            watched.calls(module)
    for module in (plain.down, plain.up, plain.norm, plain.linear):
        watched.parameters(module)


def shape_of(plain: PlainExit) -> tuple[Any, ...]:
    """What exits that are stacked have in common."""
    norm, linear = plain.norm, plain.linear
    parts = (plain.down.out_features, plain.down.bias is None, plain.up.bias is None, norm.bias is None, norm.eps)
    return (plain.reads, plain.activation, *parts, linear.bias is None, linear.weight.dtype)


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    found = [value for value in values if value is not None]  # of all exits or of none, as `shape_of` says
    return torch.stack(found) if found else None
