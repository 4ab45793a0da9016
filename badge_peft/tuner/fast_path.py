"""An exit as one straight line of tensor operations, for inference.

At short lengths a block takes no longer than a few dozen Python calls, so what an exit costs is mostly calls of
modules. The common exits (`linear` and `pooled`, with a bypass at `block` or `ffn` or none) are computed here on their
weights: the same operations in the same order as the modules', to the last bit. Everything else is left to the
modules: training, tracing, autocast, other exits and placements, mixed precisions, pre-LN models without a bypass, and
modules that have a hook or have been replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badge_peft.tuner.bypass import Bypass
from badge_peft.tuner.context import Frame
from badge_peft.tuner.exits import LinearExit, PooledExit
from badge_peft.tuner.pooling import Pooling

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
        source: What the bypass reads: the name of a tensor in `Frame`; None: there is no bypass.
        down: W_down.
        activation: g1; None is the identity.
        up: W_up.
        norm: LN'.
        dense: Of a `pooled` exit.
        linear: Gives the logits.
    """

    source: str | None
    down: Any
    activation: Callable[[Tensor], Tensor] | None
    up: Any
    norm: Any
    dense: Any
    linear: Any


def fast_exit(
    exit_: nn.Module,
    bypass: nn.Module | None,
    placement: str,
    pre_norm: bool,
    norm: nn.Module | None,
    frame: Frame,
    pooling: Pooling,
) -> tuple[Tensor, Tensor] | None:
    """The vector [B, d] that `exit_` reads, after the dense layer of a `pooled` exit, and its logits [B, K]; None
    where it is the modules' work.

    Args:
        exit_: The exit.
        bypass: Its bypass, where it has one.
        placement: Of the bypass.
        pre_norm: Whether blocks normalize their inputs: then H_{m,F} is the block's output, and an exit without a
            bypass reads normalized states.
        norm: LN' where it is shared; called past its hooks, as the modules do it.
        frame: What the block has just computed.
        pooling: Of this call.
    """
    plain = plain_exit(exit_, bypass, placement, pre_norm, norm, frame)
    if plain is None:
        return None
    vector = pooling.reduce(_states(plain, pre_norm, frame, pooling))
    if plain.dense is not None:
        vector = _linear(plain.dense, vector).tanh()
    return vector, _linear(plain.linear, vector)


def plain_exit(
    exit_: nn.Module, bypass: nn.Module | None, placement: str, pre_norm: bool, norm: Any, frame: Frame
) -> PlainExit | None:
    """The parts of an exit that can be computed on their weights; None where it is the modules' work. Arguments are
    those of `fast_exit`."""
    # a trace is made with gradients and checked without: both shall see the modules
    if torch.is_grad_enabled() or frame.scale_weights is not None or torch.jit.is_tracing():
        return None
    if torch.is_autocast_enabled(frame.output.device.type):  # the sum in place would be in its precision
        return None
    parts: Any = exit_._modules
    kind = type(exit_)
    if kind is not LinearExit and kind is not PooledExit or is_changed(exit_):
        return None
    if type(parts["dropout"]) is not nn.Dropout or parts["dropout"].training or is_changed(parts["dropout"]):
        return None
    if not is_plain(parts["linear"]) or kind is PooledExit and not is_plain(parts["dense"]):
        return None
    linear, dense = parts["linear"], parts["dense"] if kind is PooledExit else None
    dtype = linear._parameters["weight"].dtype
    if bypass is None:
        fits = not pre_norm and frame.output.dtype == dtype
        return PlainExit(None, None, None, None, None, dense, linear) if fits else None
    name = "block_input" if placement == "block" else "attention" if placement == "ffn" else None
    source = None if name is None else getattr(frame, name)
    residual = frame.output if pre_norm else frame.ffn_sum
    if source is None or residual is None or type(bypass) is not Bypass or is_changed(bypass):
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
    if not source.dtype == residual.dtype == norm.weight.dtype == down._parameters["weight"].dtype == dtype:
        return None
    return PlainExit(name, down, _ACTIVATIONS[type(activation)], up, norm, dense, linear)


def _states(plain: PlainExit, pre_norm: bool, frame: Frame, pooling: Pooling) -> Tensor:
    """H'_m at the position that the pooling picks (or at all): [B, d] or [B, S, d]."""
    if plain.source is None:
        return pooling.pick(frame.output)
    inner = _linear(plain.down, pooling.pick(getattr(frame, plain.source)))  # [B, r]
    if plain.activation is not None:
        inner = plain.activation(inner)
    residual: Any = frame.output if pre_norm else frame.ffn_sum
    adjusted = _linear(plain.up, inner).add_(pooling.pick(residual))  # B(.) + H_{m,F} (Eq. 1, 2)
    norm = plain.norm
    return F.layer_norm(adjusted, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(module: Any, x: Tensor) -> Tensor:
    parameters = module._parameters
    return F.linear(x, parameters["weight"], parameters["bias"])


def is_plain(module: Any) -> bool:
    """Whether `module` is a linear layer and nothing more."""
    return type(module) is nn.Linear and not is_changed(module)


def is_changed(module: Any) -> bool:
    """Whether a call of `module` does more than its class says (hooks, or a forward of its own, as offloading sets
    it), or its parameters are elsewhere (a replica of `nn.DataParallel`)."""
    state = module.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state or "_is_replica" in state)
