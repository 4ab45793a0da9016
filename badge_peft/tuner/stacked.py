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
_KEPT = 64  # stacks of one block module
_STACKS: WeakKeyDictionary[BadgeBlock, dict[Any, StackedExits]] = WeakKeyDictionary()


class StackedExits:
    """Exits of like shape at one block: linear ones, each with a bypass.

    Args:
        exits: T of them.
    """

    def __init__(self, exits: Sequence[PlainExit]) -> None:
        self.parameters = _parameters(exits)
        self._versions = [p._version for p in self.parameters]
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

    def fits(self, exits: Sequence[PlainExit]) -> bool:
        """Whether these are still the weights of `exits`."""
        now = _parameters(exits)
        same = len(now) == len(self.parameters) and all(a is b for a, b in zip(now, self.parameters, strict=True))
        return same and [p._version for p in now] == self._versions

    def logits(self, frame: Frame, pre_norm: bool, pooling: Pooling, which: Sequence[int]) -> list[Tensor]:
        """Logits [n, K] of the exits `which`, in ascending order."""
        take = None if len(which) == len(self.labels) else torch.tensor(which, device=self.down.device)

        def chosen(values: Any) -> Any:
            return values if take is None or values is None else values.index_select(0, take)

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
    plain = {i: own for i in range(len(adapters)) if (own := _plain(block, number, frame, adapters[i])) is not None}
    alike: dict[Any, list[int]] = {}
    for i, own in plain.items():
        if own.source is not None and own.dense is None:
            alike.setdefault(_shape(own), []).append(i)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        which = [n for n, i in enumerate(places) if i in asking]
        if len(which) > 1:
            key = (number, *(adapters[i].adapter for i in places))
            stack = _stack_of(block, key, [plain[i] for i in places])
            logits = stack.logits(frame, block.layout.pre_norm, pooling, which)
            found |= {places[n]: x for n, x in zip(which, logits, strict=True)}
    return found


def _plain(block: BadgeBlock, number: int, frame: Frame, exits: AdapterExits) -> PlainExit | None:
    if exits.past_future or not block.has_exit(exits.adapter, number):
        return None
    bypass, norm = block.bypass_of(exits, number)
    placement, exit_ = block.badge_placement[exits.adapter], block.own_exit(exits.adapter, number)
    if exit_.linear.weight.is_inference():  # such a weight does not tell when it changes
        return None
    return plain_exit(exit_, bypass, placement, block.layout.pre_norm, norm, frame)


def _shape(plain: PlainExit) -> tuple[Any, ...]:
    """What exits that are stacked have in common."""
    norm, linear = plain.norm, plain.linear
    parts = (plain.down.out_features, plain.down.bias is None, plain.up.bias is None, norm.bias is None, norm.eps)
    return (plain.source, plain.activation, *parts, linear.bias is None, linear.weight.dtype)


def _stack_of(block: BadgeBlock, key: Any, exits: Sequence[PlainExit]) -> StackedExits:
    stacks = _STACKS.setdefault(block, {})
    found = stacks.get(key)
    if found is None or not found.fits(exits):
        if len(stacks) >= _KEPT:
            stacks.clear()
        found = stacks[key] = StackedExits(exits)
    return found


def _parameters(exits: Sequence[PlainExit]) -> list[Tensor]:
    return [
        p
        for e in exits
        for module in (e.down, e.up, e.norm, e.linear)
        for p in module._parameters.values()
        if p is not None
    ]


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    return None if values[0] is None else torch.stack(list(values))  # type: ignore[arg-type]
