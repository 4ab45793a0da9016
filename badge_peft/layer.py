"""`Bypass` (Eq. 1-2) and `BadgeBlock`, which wraps one transformer block and leaves it to do its work."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from badge_peft.architectures import BlockLayout
from badge_peft.config import BadgeConfig
from badge_peft.heads import MultiExitHead
from badge_peft.pooling import Pooling
from badge_peft.run import Frame, current_run

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
    """The bottleneck of one block: B(x) = g1(x W_down) W_up (Eq. 1), and the LayerNorm LN' behind it (Eq. 2).

    W_up starts at zero, so that an exit starts from the block's own output.

    Args:
        hidden_size: d.
        r: Bottleneck dimension.
        activation: g1.
        bias: Biases in both projections.
        norm: A LayerNorm whose copy becomes LN', or None when LN' is shared with the block.
    """

    def __init__(self, hidden_size: int, r: int, activation: str, bias: bool, norm: nn.Module | None) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, r, bias=bias)
        self.activation = ACTIVATION_MODULES[activation]()
        self.up = nn.Linear(r, hidden_size, bias=bias)
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.up.bias)
        self.norm = None if norm is None else _plain_copy(norm)

    def forward(self, source: Tensor, residual: Tensor, shared_norm: nn.Module) -> Tensor:
        """LN'( B(source) + residual ); both [..., d], the result too."""
        dtype = self.down.weight.dtype
        inner = self.activation(self.down(source.to(dtype)))  # [..., r]
        adjusted = self.up(inner) + residual.to(dtype)  # [..., d]
        if self.norm is not None:
            return self.norm(adjusted)
        return apply_norm(shared_norm, adjusted)


class BadgeBlock(nn.Module, BaseTunerLayer):
    """One transformer block with its bypasses and exits. Without a running call it is the block itself.

    Args:
        base_layer: The block.
        numbers: The block numbers at which the model runs it: one, or all M for ALBERT's shared block.
        layout: Where the block's parts are.
        exit_norm: The norm that LN' copies or shares: the block's last, or the model's final one (pre-LN).
    """

    adapter_layer_names = ("badge_bypass", "badge_exit")
    other_param_names = ("badge_placement",)

    def __init__(self, base_layer: nn.Module, numbers: list[int], layout: BlockLayout, exit_norm: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.numbers = numbers
        self.layout = layout
        self.badge_bypass = nn.ModuleDict()
        self.badge_exit = nn.ModuleDict()
        self.badge_placement: dict[str, str] = {}
        self.returns_tuple: bool | None = None  # known once the block has run
        self._exit_norm = (exit_norm,)  # in a tuple: it belongs to the block or to the model, not to us
        self._hooks: dict[str, Any] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: BadgeConfig, exits: list[int]) -> None:
        """Adds the bypasses and exits of `adapter_name`: those of `exits` that belong to this block.

        Args:
            adapter_name: The adapter.
            config: Its config, with `num_labels` and `hidden_size` filled in.
            exits: Block numbers that have an exit of their own, 0 among them when the embeddings have one.
        """
        assert config.hidden_size is not None  # filled in by BadgeModel
        numbers = [m for m in exits if m in self.numbers or (m == 0 and 1 in self.numbers)]
        self.badge_placement[adapter_name] = config.placement
        if numbers:
            self.badge_exit[adapter_name] = MultiExitHead(
                numbers, config.exit_type, config.hidden_size, config.resolved_labels, config.exit_dropout
            )
        bypassed = [m for m in numbers if m > 0]
        if config.placement != "none" and bypassed:
            norm = self._exit_norm[0] if config.norm == "own" else None
            self.badge_bypass[adapter_name] = nn.ModuleDict(
                {str(m): Bypass(config.hidden_size, config.r, config.activation, config.bias, norm) for m in bypassed}
            )
            self._watch(config.placement)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own forward: the layer loop of the model calls it and never notices."""
        run = current_run()
        if run is None or self._disable_adapters:
            return self.base_layer(*args, **kwargs)
        return run.visit(self, args, kwargs)

    def has_exit(self, adapter: str, number: int) -> bool:
        """Whether `adapter` reads an exit of ours at block `number` (0: the embeddings)."""
        return adapter in self.badge_exit and str(number) in cast(nn.ModuleDict, self.badge_exit[adapter])

    def exit_logits(self, adapter: str, number: int, frame: Frame, pooling: Pooling) -> Tensor:
        """Logits of exit `number`, [B, K], from what the block has just computed."""
        if number > 0 and adapter in self.badge_bypass:
            state = self._bypassed(self.badge_bypass[adapter][str(number)], adapter, frame, pooling)  # type: ignore
        else:
            state = pooling.pick(frame.output)
            if number > 0 and self.layout.pre_norm:  # the model's own head reads normalised states, too
                state = apply_norm(self._exit_norm[0], state)
        return self.badge_exit[adapter].logits(number, pooling.reduce(state))  # type: ignore[operator]

    def _bypassed(self, bypass: Bypass, adapter: str, frame: Frame, pooling: Pooling) -> Tensor:
        """H'_m at the pooled position(s)."""
        residual = frame.output if self.layout.pre_norm else frame.ffn_sum  # H_{m,F}
        source = frame.block_input if self.badge_placement[adapter] == "block" else frame.attention
        assert residual is not None and source is not None  # the hooks have run
        return bypass(pooling.pick(source), pooling.pick(residual), self._exit_norm[0])

    def _watch(self, placement: str) -> None:
        """Puts hooks on the block's norms, for what a bypass reads beyond the block's input and output."""
        layout = self.layout
        if layout.last_norm and "ffn_sum" not in self._hooks:
            norm = self.base_layer.get_submodule(layout.last_norm)
            self._hooks["ffn_sum"] = norm.register_forward_pre_hook(_RecordInput("ffn_sum"))
        if placement == "ffn" and "attention" not in self._hooks:
            norm = self.base_layer.get_submodule(layout.attention_norm)
            self._hooks["attention"] = (
                norm.register_forward_pre_hook(_RecordInput("attention"))
                if layout.pre_norm
                else norm.register_forward_hook(_RecordOutput("attention"))
            )

    def remove_hooks(self) -> None:
        """Takes our hooks off the block, which is then as it was."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: a bypass feeds an exit, not the block."""
        raise NotImplementedError(MERGE_ERROR)

    def unmerge(self) -> None:
        """Not possible, as nothing is ever merged."""
        raise NotImplementedError(MERGE_ERROR)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, Any]:
        # a block has no weight of its own: take its first floating-point parameter
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return None, None

    def __getattr__(self, name: str) -> Any:
        # models read attributes of their blocks (ModernBERT: attention_type)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "badge." + super().__repr__()


MERGE_ERROR = (
    "BADGE cannot be merged: a bypass feeds its block's exit and never the block, so the base weights have nothing to "
    "take in. Use unload() to get the base model back."
)


class _RecordInput:
    """A forward pre-hook that notes the input of a norm in the frame of the running block."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        run = current_run()
        if run is not None and run.frame is not None:
            run.frame.record(self.name, args[0])


class _RecordOutput:
    """A forward hook that notes the output of a norm in the frame of the running block."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        run = current_run()
        if run is not None and run.frame is not None:
            run.frame.record(self.name, output)


def apply_norm(norm: nn.Module, states: Tensor) -> Tensor:
    """Applies a norm of the model in its own precision, past its hooks (ours would record the call)."""
    weight = getattr(norm, "weight", None)
    return norm.forward(states if weight is None else states.to(weight.dtype))


def _plain_copy(norm: nn.Module) -> nn.Module:
    new = copy.deepcopy(norm)
    new._forward_hooks.clear()
    new._forward_pre_hooks.clear()
    return new.requires_grad_(True)
