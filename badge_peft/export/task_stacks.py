"""The exits of many tasks at one block as one product of stacked weights, in a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badge_peft.early_exit.readers import ExitReader
from badge_peft.tuner.bypass import Bypass, states_read
from badge_peft.tuner.context import Frame
from badge_peft.tuner.exits import LinearExit
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.pooling import Pooling

#: Logits of labels that an exit lacks, beside others that have them: as good as impossible.
MISSING = -1e30
_ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor] | None] = {
    nn.GELU: F.gelu,
    nn.ReLU: F.relu,
    nn.LeakyReLU: F.leaky_relu,
    nn.SiLU: F.silu,
    nn.Tanh: torch.tanh,
    nn.Identity: None,
}


class PlainExit(NamedTuple):
    """A linear exit behind a bypass, as the modules whose weights make all of it."""

    reads: tuple[str, ...]  # names in `Frame` of what the bypass reads, and of H_{m,F}, to which it is added
    down: Any
    activation: Callable[[Tensor], Tensor] | None
    up: Any
    norm: Any
    linear: Any

    @property
    def shape(self) -> Hashable:
        """What exits that are stacked have in common."""
        norm, linear = self.norm, self.linear
        parts = (self.down.out_features, self.down.bias is None, self.up.bias is None, norm.bias is None, norm.eps)
        return (self.reads, self.activation, *parts, linear.bias is None, linear.weight.dtype)


class ExportedStack(nn.Module):
    """Exits of T tasks, of like shape, whose stacked weights are buffers: those of single exits are not in the file.
    The weights of LN' are folded into those of the linear layer behind it: (n w + b) W + c = n (w W) + (b W + c)."""

    def __init__(self, tasks: list[str], exits: Sequence[PlainExit]) -> None:
        super().__init__()
        self.tasks = tasks
        first = exits[0]
        self.reads, self.activation = first.reads, first.activation
        self.shape, self.eps = first.norm.normalized_shape, first.norm.eps
        widest = max(e.linear.out_features for e in exits)
        missing = max(MISSING, torch.finfo(first.linear.weight.dtype).min)
        with torch.no_grad():
            gaps = [widest - e.linear.out_features for e in exits]
            weight = torch.stack([F.pad(e.linear.weight, (0, 0, 0, k)) for e, k in zip(exits, gaps, strict=True)])
            bias = torch.stack([F.pad(e.linear.bias, (0, k), value=missing) for e, k in zip(exits, gaps, strict=True)])
            scale, shift = torch.stack([e.norm.weight for e in exits]), _stack([e.norm.bias for e in exits])
            if shift is not None:
                bias = bias + torch.bmm(weight, shift.unsqueeze(-1)).squeeze(-1)
            down_bias, up_bias = _stack([e.down.bias for e in exits]), _stack([e.up.bias for e in exits])
            self.register_buffer("down", torch.cat([e.down.weight for e in exits]))  # [T r, d]
            self.register_buffer("down_bias", None if down_bias is None else down_bias.flatten())
            self.register_buffer("up", torch.stack([e.up.weight.t() for e in exits]))  # [T, r, d]
            self.register_buffer("up_bias", None if up_bias is None else up_bias.unsqueeze(1))
            self.register_buffer("weight", (weight * scale.unsqueeze(1)).transpose(1, 2).contiguous())  # [T, d, K]
            self.register_buffer("bias", bias.unsqueeze(1))  # [T, 1, K]

    def forward(self, frame: Frame, pooling: Pooling) -> Tensor:
        """Logits [T, n, K]; of labels that an exit lacks, `MISSING`."""
        down, down_bias, up, up_bias, weight, bias = self._buffers.values()
        source, residual = (pooling.pick(getattr(frame, name)) for name in self.reads)  # [n, d]
        inner = F.linear(source, cast(Tensor, down), down_bias)
        if self.activation is not None:
            inner = self.activation(inner)
        assert up is not None and weight is not None and bias is not None
        inner = inner.view(-1, len(self.tasks), up.shape[1]).transpose(0, 1)  # [T, n, r]
        adjusted = torch.bmm(inner, up) if up_bias is None else torch.baddbmm(up_bias, inner, up)
        normal = torch.layer_norm(adjusted + residual, self.shape, None, None, self.eps)  # B(.) + H_{m,F} (Eq. 1, 2)
        return torch.baddbmm(bias, normal, weight)


def stacks_of(block: BadgeBlock, number: int, frame: Frame, readers: Mapping[str, ExitReader]) -> list[ExportedStack]:
    """Stacks of the exits `number` of these tasks that are alike; the embeddings, 0, have no bypass. With mean
    pooling, exits stay apart: all positions of eight tasks at once would leave the caches."""
    alike: dict[Hashable, list[str]] = {}
    plain = {}
    for task, reader in readers.items():
        if number == 0 or reader.reads_uncertainty or reader.pooling.kind not in ("cls", "last"):
            continue
        own = _plain_exit(block, number, frame, reader)
        if own is not None:
            plain[task] = own
            alike.setdefault((reader.pooling.kind, own.shape), []).append(task)
    return [ExportedStack(tasks, [plain[t] for t in tasks]) for tasks in alike.values() if len(tasks) > 1]


def _plain_exit(block: BadgeBlock, number: int, frame: Frame, reader: ExitReader) -> PlainExit | None:
    """The parts of an exit that is nothing but its weights; None where it is the modules' work."""
    adapter = reader.exits.adapter
    exit_, bypass = block.own_exit(adapter, number), block.bypass_of(adapter, number)
    placement = block.badge_placement[adapter]
    if type(exit_) is not LinearExit or type(bypass) is not Bypass or placement not in ("block", "ffn"):
        return None
    linear, norm = (bypass.down, bypass.up, exit_.linear), bypass.norm
    if any(map(_is_changed, (exit_, exit_.dropout, bypass, bypass.activation, norm, *linear))):
        return None
    if any(type(layer) is not nn.Linear for layer in linear) or type(norm) is not nn.LayerNorm or norm.weight is None:
        return None
    reads = states_read(placement, block.layout.pre_norm)
    dtypes = {getattr(getattr(frame, name), "dtype", None) for name in reads}
    if type(bypass.activation) not in _ACTIVATIONS or dtypes != {exit_.linear.weight.dtype}:
        return None
    return PlainExit(reads, bypass.down, _ACTIVATIONS[type(bypass.activation)], bypass.up, norm, exit_.linear)


def _is_changed(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its class says: by hooks, or a forward of its own (offloading)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    found = [value for value in values if value is not None]  # of all exits or of none, as their shape says
    return torch.stack(found) if found else None


def side_by_side(found: Sequence[tuple[list[str], Tensor]], group: Sequence[str], labels: int) -> Tensor:
    """Logits [n, K] of a group's task, or [n, T, K] of its T tasks, out of tasks with their logits
    [T', n, K'], or [n, K] of one; of labels that a task lacks, `MISSING`."""
    each: dict[str, Tensor] = {}
    for tasks, logits in found:
        if len(group) > 1 and tasks == [*group]:
            return logits.transpose(0, 1)
        each |= {task: logits[i] if len(tasks) > 1 else logits for i, task in enumerate(tasks) if task in group}
    parts = [each[task][..., :labels] if each[task].shape[-1] > labels else each[task] for task in group]
    if len(group) == 1:
        return parts[0]
    return torch.stack([F.pad(part, (0, labels - part.shape[-1]), value=MISSING) for part in parts], dim=1)
