"""H'_m (Eq. 2), pooled over the positions, in training on states that take no gradient.

Where exits pool by the mean, what they train on is long and what they train is small, so the time goes into reading
and writing [B, S, d]: the modules do it some twenty times, forward and backward. Here mean_s LN'( B(x_s) + f_s ) is
one function with a backward of its own, which reads the normalized states and the source, and writes nothing of that
size.
The mean is taken before LN's weights are applied, which are the same at all positions. Equal to the modules to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badge_peft.tuner.bypass import Bypass, states_read
from badge_peft.tuner.context import Frame
from badge_peft.tuner.pooling import Pooling


class _MeanOfBypassed(torch.autograd.Function):
    """sum_s w_s n_s, where n_s is y_s = g1(x_s W_down) W_up + f_s with its mean taken off, over its deviation."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,  # x [B, S, d]
        residual: Tensor,  # f [B, S, d]
        weights: Tensor,  # w [B, S], 0 at padding
        down: Tensor,  # [r, d]
        down_bias: Tensor | None,
        up: Tensor,  # [d, r]
        up_bias: Tensor | None,
        activation: Callable[[Tensor], Tensor],
        eps: float,
    ) -> Tensor:
        inner = F.linear(source, down, down_bias).requires_grad_()  # [B, S, r]
        with torch.enable_grad():  # the derivative of g1 is left to torch
            active = activation(inner)
        states = F.linear(active.detach(), up, up_bias).add_(residual)  # y
        normal, _, scale = torch.native_layer_norm(states, states.shape[-1:], None, None, eps)  # n, 1 / deviation
        ctx.save_for_backward(source, weights, up, normal, scale)
        ctx.inner, ctx.active = inner, active
        return torch.bmm(weights.unsqueeze(1), normal).squeeze(1)  # [B, d]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With g [B, d]: dy_s = q_s (g - mean(g) - n_s k_s), where q_s = w_s / deviation_s and k_s = n_s g / d."""
        source, weights, up, normal, scale = ctx.saved_tensors
        active = ctx.active.detach()
        width, rank = source.shape[-1], active.shape[-1]
        centered = grad - grad.mean(dim=-1, keepdim=True)  # [B, d]
        q = weights.unsqueeze(-1) * scale  # [B, S, 1]
        qk = q * torch.bmm(normal, grad.unsqueeze(-1)) / width  # [B, S, 1]
        inner = q * (centered @ up).unsqueeze(1) - qk * (normal @ up)  # dy W_up^T [B, S, r]
        flat = normal.reshape(-1, width)
        grad_up = centered.T @ (q * active).sum(dim=1) - flat.T @ (qk * active).reshape(-1, rank)  # [d, r]
        grad_up_bias = None
        if ctx.needs_input_grad[6]:
            grad_up_bias = (centered * q.sum(dim=1)).sum(dim=0) - flat.T @ qk.reshape(-1)
        (inner,) = torch.autograd.grad(ctx.active, ctx.inner, inner, retain_graph=True)
        grad_down = inner.reshape(-1, rank).T @ source.reshape(-1, width)  # [r, d]
        grad_down_bias = inner.sum(dim=(0, 1)) if ctx.needs_input_grad[4] else None
        return None, None, None, grad_down, grad_down_bias, grad_up, grad_up_bias, None, None


def mean_of_bypassed(
    bypass: nn.Module | None, placement: str, pre_norm: bool, frame: Frame, pooling: Pooling
) -> Tensor | None:
    """The mean over positions of H'_m, [B, d]; None where it is the modules' work: without gradients, where the states
    take some, and for whatever is not a plain bypass at `block` or `ffn` in float32.

    Args:
        bypass: Of the exit.
        placement: Of the bypass.
        pre_norm: Whether blocks normalize their inputs.
        frame: What the block has computed.
        pooling: Of this call.
    """
    if not torch.is_grad_enabled() or pooling.kind != "mean" or placement not in ("block", "ffn"):
        return None
    if type(bypass) is not Bypass or is_changed(bypass) or torch.jit.is_tracing():
        return None
    down, up, activation, norm = bypass.down, bypass.up, bypass.activation, bypass.norm
    if not (is_plain(down) and is_plain(up)) or is_changed(activation) or type(norm) is not nn.LayerNorm:
        return None
    if is_changed(norm):
        return None
    source, residual = (getattr(frame, name) for name in states_read(placement, pre_norm))
    used = (source, residual, down.weight, up.weight, norm.weight)
    if any(x is None or x.dtype is not torch.float32 for x in used) or source.requires_grad or residual.requires_grad:
        return None
    if torch.is_autocast_enabled(source.device.type):
        return None
    weights = pooling.weights(source)
    mean = _MeanOfBypassed.apply(
        source, residual, weights, down.weight, down.bias, up.weight, up.bias, activation, norm.eps
    )
    if norm.bias is None:
        return mean * norm.weight
    return mean * norm.weight + norm.bias * weights.sum(dim=1, keepdim=True)


def is_plain(module: Any) -> bool:
    """Whether `module` is a linear layer and nothing more."""
    return type(module) is nn.Linear and not is_changed(module)


def is_changed(module: Any) -> bool:
    """Whether a call of `module` does more than its class says (hooks, or a forward of its own, as offloading sets
    it), or its parameters are elsewhere (a replica of `nn.DataParallel`)."""
    state = module.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state or "_is_replica" in state)
