"""An exit as one straight line of tensor operations, for inference.

At short lengths a block takes no longer than a few dozen Python calls, so what an exit costs is mostly calls of
modules. The common exits (`linear` and `pooled`, with a bypass at `block` or `ffn` or none) are computed here on their
weights: the same operations in the same order as the modules', to the last bit. Everything else is left to the
modules: training, other exits and placements, mixed precisions, pre-LN models without a bypass, and modules that
somebody has put a hook on or has replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badge_peft.tuner.bypass import Bypass
from badge_peft.tuner.exits import LinearExit, PooledExit

if TYPE_CHECKING:
    from badge_peft.tuner.layer import BadgeBlock
    from badge_peft.tuner.pooling import Pooling
    from badge_peft.tuner.run import Frame

_ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor] | None] = {
    nn.GELU: F.gelu,
    nn.ReLU: F.relu,
    nn.LeakyReLU: F.leaky_relu,
    nn.SiLU: F.silu,
    nn.Tanh: torch.tanh,
    nn.Identity: None,
}


def fused_vector(block: BadgeBlock, adapter: str, number: int, frame: Frame, pooling: Pooling) -> Tensor | None:
    """The vector [B, d] that exit `number` of `block` reads, behind the dense layer of a `pooled` exit; None where it
    is the modules' work."""
    if torch.is_grad_enabled() or frame.scale_weights is not None:
        return None
    exit_ = block.own_exit(adapter, number)
    parts: Any = exit_._modules
    kind = type(exit_)
    if kind is not LinearExit and kind is not PooledExit or _changed(exit_):
        return None
    if type(parts["dropout"]) is not nn.Dropout or parts["dropout"].training or _changed(parts["dropout"]):
        return None
    if not _plain(parts["linear"]) or kind is PooledExit and not _plain(parts["dense"]):
        return None
    states = _states(block, adapter, number, frame, pooling)
    if states is None or states.dtype != parts["linear"]._parameters["weight"].dtype:
        return None
    vector = pooling.reduce(states)
    return vector if kind is LinearExit else _linear(parts["dense"], vector).tanh()


def fused_logits(exit_: nn.Module, vector: Tensor) -> Tensor:
    """[B, K] of an exit for which `fused_vector` gave [B, d]."""
    return _linear(exit_._modules["linear"], vector)


def _states(block: BadgeBlock, adapter: str, number: int, frame: Frame, pooling: Pooling) -> Tensor | None:
    """H'_m at the position that the pooling picks (or at all): [B, d] or [B, S, d]."""
    bypasses: Any = block._adapters("badge_bypass").get(adapter) if number > 0 else None
    if bypasses is None:
        return None if number > 0 and block.layout.pre_norm else pooling.pick(frame.output)
    bypass = bypasses._modules[str(number)]
    placement = block.badge_placement[adapter]
    source = frame.block_input if placement == "block" else frame.attention if placement == "ffn" else None
    residual = frame.output if block.layout.pre_norm else frame.ffn_sum
    if source is None or residual is None or type(bypass) is not Bypass or _changed(bypass):
        return None
    parts: Any = bypass._modules
    down, up, activation = parts["down"], parts["up"], parts["activation"]
    if not (_plain(down) and _plain(up) and type(activation) in _ACTIVATIONS) or _changed(activation):
        return None
    norm: Any = parts.get("norm")
    if norm is None:
        norm = block.exit_norm  # a shared one: past the hooks of the model's norm, as the module path goes
    elif _changed(norm):
        return None
    if type(norm) is not nn.LayerNorm or norm.weight is None:
        return None
    if not source.dtype == residual.dtype == norm.weight.dtype == down._parameters["weight"].dtype:
        return None
    inner = _linear(down, pooling.pick(source))  # [B, r]
    function = _ACTIVATIONS[type(activation)]
    if function is not None:
        inner = function(inner)
    adjusted = _linear(up, inner).add_(pooling.pick(residual))  # B(.) + H_{m,F} (Eq. 1, 2)
    return F.layer_norm(adjusted, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(module: Any, x: Tensor) -> Tensor:
    parameters = module._parameters
    return F.linear(x, parameters["weight"], parameters["bias"])


def _plain(module: Any) -> bool:
    """Whether `module` is a linear layer and nothing more."""
    return type(module) is nn.Linear and not _changed(module)


def _changed(module: Any) -> bool:
    """Whether a call of `module` does more than its class says: hooks, or a forward of its own (offloading)."""
    state = module.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)
