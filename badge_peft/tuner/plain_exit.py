"""Exits that are nothing but their weights: linear ones behind a bypass, without a hook or a part of another class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badge_peft.tuner.bypass import Bypass, states_read
from badge_peft.tuner.context import Frame
from badge_peft.tuner.exits import CenteredDropout, LinearExit

_ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor] | None] = {
    nn.GELU: F.gelu,
    nn.ReLU: F.relu,
    nn.LeakyReLU: F.leaky_relu,
    nn.SiLU: F.silu,
    nn.Tanh: torch.tanh,
    nn.Identity: None,
}


class PlainExit(NamedTuple):
    """An exit and its bypass as the modules whose weights make all of it.

    Args:
        reads: Names in `Frame` of what the bypass reads, and of H_{m,F}, to which it is added.
        down: W_down.
        activation: g1; None is the identity.
        up: W_up.
        norm: LN'.
        linear: Gives the logits.
    """

    reads: tuple[str, ...]
    down: Any
    activation: Callable[[Tensor], Tensor] | None
    up: Any
    norm: Any
    linear: Any


def plain_exit(
    exit_: nn.Module, bypass: nn.Module | None, placement: str, pre_norm: bool, norm: Any, frame: Frame
) -> PlainExit | None:
    """The parts of an exit that can be computed on their weights, where no gradient is asked for; None where it is
    the modules' work.

    Args:
        exit_: The exit.
        bypass: Its bypass, where it has one.
        placement: Of the bypass.
        pre_norm: Whether blocks normalize their inputs.
        norm: LN' where it is shared; called past its hooks, as the modules do it.
        frame: What the block has just computed.
    """
    parts: Any = exit_._modules
    if type(exit_) is not LinearExit or is_changed(exit_) or not is_plain(parts["linear"]):
        return None
    if type(parts["dropout"]) is not CenteredDropout or parts["dropout"].training or is_changed(parts["dropout"]):
        return None
    linear = parts["linear"]
    if placement not in ("block", "ffn") or type(bypass) is not Bypass or is_changed(bypass):
        return None
    reads = states_read(placement, pre_norm)
    states, residual = (getattr(frame, name) for name in reads)
    if states is None or residual is None:
        return None
    parts = bypass._modules
    down, up, activation = parts["down"], parts["up"], parts["activation"]
    if not (is_plain(down) and is_plain(up) and type(activation) in _ACTIVATIONS) or is_changed(activation):
        return None
    if parts.get("norm") is not None:
        norm = parts["norm"]
        if is_changed(norm):
            return None
    if type(norm) is not nn.LayerNorm or norm.weight is None:
        return None
    weights = (norm.weight, down._parameters["weight"], linear._parameters["weight"])
    if any(x.dtype != states.dtype for x in (residual, *weights)):
        return None
    return PlainExit(reads, down, _ACTIVATIONS[type(activation)], up, norm, linear)


def is_plain(module: Any) -> bool:
    """Whether `module` is a linear layer and nothing more."""
    return type(module) is nn.Linear and not is_changed(module)


def is_changed(module: Any) -> bool:
    """Whether a call of `module` does more than its class says (hooks, or a forward of its own, as offloading sets
    it), or its parameters are elsewhere (a replica of `nn.DataParallel`)."""
    state = module.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state or "_is_replica" in state)
