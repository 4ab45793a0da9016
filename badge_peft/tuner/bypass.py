"""`Bypass` (Eq. 1) and what an exit reads because of it, H'_m (Eq. 2 and its ablations)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.func import functional_call

from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.context import Frame
from badge_peft.tuner.pooling import Pooling

Scale = Callable[[Tensor], Tensor]

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


class Bypass(nn.Module):
    """The bottleneck of one block: B(x) = g1(x W_down) W_up (Eq. 1), followed by the LayerNorm LN' (Eq. 2).

    W_up starts at zero, so that an exit starts from the block's own output.

    Args:
        hidden_size: d.
        r: Bottleneck dimension.
        activation: g1.
        bias: Biases in both projections.
        norm: A LayerNorm whose copy becomes LN'.
    """

    def __init__(self, hidden_size: int, r: int, activation: str, bias: bool, norm: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, r, bias=bias)
        self.activation = ACTIVATION_MODULES[activation]()
        self.up = nn.Linear(r, hidden_size, bias=bias)
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.up.bias)
        self.norm = _plain_copy(norm)

    def forward(self, source: Tensor, residual: Tensor) -> Tensor:
        """LN'( B(source) + residual ); both [..., d], the result too."""
        return self.norm(self.bottleneck(source) + residual.to(self.down.weight.dtype))

    def bottleneck(self, source: Tensor) -> Tensor:
        """B(source): [..., d] -> [..., r] -> [..., d]."""
        return self.up(self.activation(self.down(source.to(self.down.weight.dtype))))


def bypassed_states(
    bypass: Bypass, placement: str, block: nn.Module, layout: BlockLayout, frame: Frame, pooling: Pooling
) -> Tensor:
    """H'_m, at the position that the pooling picks, or at all of them.

    * `block`: LN'( B(H_{m-1}) + H_{m,F} )                                                          (Eq. 2)
    * `ffn`:   LN'( B(H_{m,MHA}) + H_{m,F} )
    * `mhsa`:  H'_MHA = LN_attn( B(H_{m-1}) + attention output + H_{m-1} ), then LN'( FFN(H'_MHA) + H'_MHA )"""
    source = frame.attention if placement == "ffn" else frame.block_input
    assert source is not None  # the hooks have run
    source = pooling.pick(source)
    if placement == "mhsa":
        sums = frame.attention if layout.pre_norm else frame.attention_sum
        assert sums is not None
        adjustment = bypass.bottleneck(source)
        inner = adjustment + pooling.pick(sums).to(adjustment.dtype)
        if not layout.pre_norm:
            inner = apply_norm(block.get_submodule(layout.attention_norm), inner, frame.scale_weights)
        return bypass.norm((_ffn(block, layout, inner, frame.scale_weights) + inner).to(bypass.down.weight.dtype))
    residual = frame.output if layout.pre_norm else frame.ffn_sum  # H_{m,F}
    assert residual is not None
    return bypass(source, pooling.pick(residual))


def states_read(placement: str, pre_norm: bool) -> tuple[str, ...]:
    """The names in `Frame` of what an exit with this placement reads of its block."""
    if placement == "none":
        return ("output",)
    if placement == "mhsa":
        return "block_input", ("attention" if pre_norm else "attention_sum")
    return ("attention" if placement == "ffn" else "block_input"), ("output" if pre_norm else "ffn_sum")


def apply_norm(norm: nn.Module, states: Tensor, scale_weights: Scale | None = None) -> Tensor:
    """Applies a norm of the model in its own precision, past its hooks (ours would record the call)."""
    weight = getattr(norm, "weight", None)
    states = states if weight is None else states.to(weight.dtype)
    return norm.forward(states) if scale_weights is None else _scaled(norm, states, scale_weights)


def _ffn(block: nn.Module, layout: BlockLayout, states: Tensor, scale_weights: Scale | None) -> Tensor:
    """FFN(states), by the block's own submodules."""
    for path in layout.ffn:
        part = block.get_submodule(path)
        first = next((p for _, p in own_parameters(part)), None)
        if first is not None and first.is_floating_point():  # integers of a quantized layer, which casts on its own
            states = states.to(first.dtype)
        states = part(states) if scale_weights is None else _scaled(part, states, scale_weights)
    return states


def _scaled(part: nn.Module, states: Tensor, scale_weights: Scale) -> Tensor:
    """Gradient equilibrium: the exit's gradient reaches these weights of the block, too."""
    return functional_call(part, {name: scale_weights(p) for name, p in own_parameters(part)}, (states,))


def own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters`, also on a replica of `nn.DataParallel`, which keeps them as plain tensors."""
    for prefix, part in module.named_modules():
        for name, value in getattr(part, "_former_parameters", part._parameters).items():
            if value is not None:
                yield f"{prefix}.{name}" if prefix else name, value


def _plain_copy(norm: nn.Module) -> nn.Module:
    new = copy.deepcopy(norm)
    new._forward_hooks.clear()
    new._forward_pre_hooks.clear()
    return new.requires_grad_(True)
