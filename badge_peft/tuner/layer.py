"""`BadgeBlock`: wraps one transformer block, leaves it to do its work, and holds its bypasses and exits."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.bypass import Bypass, apply_norm, bypassed_states
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.context import Frame, Recorder, current_pass, watch_block
from badge_peft.tuner.exits import AdapterExits, CarriedLogits, Exit, ExitState, MultiExitHead, PooledExit, build_on
from badge_peft.tuner.pooling import Pooling
from badge_peft.tuner.preconditions import is_quantized


class BadgeBlock(nn.Module, BaseTunerLayer):
    """One transformer block with its bypasses and exits. Outside of a pass it is the block itself.

    Args:
        base_layer: The block.
        numbers: The block numbers at which the model runs it: one, or all M for ALBERT's shared block.
        layout: Where the block's parts are.
    """

    adapter_layer_names = ("badge_bypass", "badge_exit", "badge_doubt")
    other_param_names = ("badge_placement",)

    def __init__(self, base_layer: nn.Module, numbers: list[int], layout: BlockLayout) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.numbers = numbers
        self.layout = layout
        self.badge_bypass = nn.ModuleDict()
        self.badge_exit = nn.ModuleDict()
        self.badge_doubt = nn.ModuleDict()  # LTE's one layer for all exits, in block 1
        self.badge_placement: dict[str, str] = {}
        self._hooks: dict[str, Any] = {}
        self.recorders: dict[str, Recorder] = {}  # the hooks themselves
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(
        self,
        adapter_name: str,
        config: BadgeConfig,
        exits: list[int],
        exit_norm: nn.Module,
        pooler: nn.Module | None = None,
    ) -> None:
        """Adds the bypasses and exits of `adapter_name`: those of `exits` (0: of the embeddings) that belong to this
        block. LN' copies `exit_norm`, the dense layer of a `pooled` exit `pooler`."""
        self.badge_placement[adapter_name] = config.placement
        for kind, part in adapter_modules(config, self.numbers, exits, exit_norm).items():
            part.train(self.base_layer.training)  # an adapter that joins a model in eval() must not drop anything
            cast(nn.ModuleDict, getattr(self, kind))[adapter_name] = part
        _start_from_pooler(self._adapters("badge_exit").get(adapter_name), pooler)
        if adapter_name in self.badge_bypass:
            watch_block(self.base_layer, self.layout, config.placement, self._hooks, self.recorders)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own forward: the layer loop of the model calls it and never notices."""
        running = current_pass()
        if running is None or self._disable_adapters:
            # never None; `typing.cast` would cost a call per block
            return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        return running.visit(self, args, kwargs)

    def has_exit(self, adapter: str, number: int) -> bool:
        """Whether `adapter` reads an exit of ours at block `number` (0: the embeddings)."""
        exits = self._adapters("badge_exit").get(adapter)
        return exits is not None and str(number) in exits._modules

    def own_exit(self, adapter: str, number: int) -> Exit:
        """The exit of `adapter` at block `number`."""
        return cast(Exit, self._adapters("badge_exit")[adapter]._modules[str(number)])

    def read_exit(
        self, exits: AdapterExits, number: int, frame: Frame, pooling: Pooling, state: ExitState
    ) -> tuple[Tensor, Tensor]:
        """What exit `number` makes of what the block has just computed: the vector [B, d] that it reads, and logits
        [B, K]."""
        exit_ = self.own_exit(exits.adapter, number)
        bypass = self.bypass_of(exits.adapter, number)
        picking = Pooling("mean", pooling.mask) if exit_.reads_sequence else pooling  # all positions, or the one
        if bypass is not None:
            placement = self.badge_placement[exits.adapter]
            states = bypassed_states(bypass, placement, self.base_layer, self.layout, frame, picking)
        else:
            states = picking.pick(frame.output)
            if number > 0 and self.layout.pre_norm:  # the model's own head reads normalized states, too
                assert exits.final_norm is not None
                states = apply_norm(exits.final_norm, states)
        vector = exit_.represent(states.to(exit_.linear.weight.dtype), pooling)
        if exits.pooler is not None:
            vector = _pool_by(exits.pooler, vector)
        return vector, build_on(exits, exit_, exit_(vector, state), state)

    def bypass_of(self, adapter: str, number: int) -> Any:
        """The bypass of exit `number`; None where it has none."""
        bypasses: Any = self._adapters("badge_bypass").get(adapter) if number > 0 else None
        return None if bypasses is None else bypasses._modules[str(number)]

    def _adapters(self, name: str) -> dict[str, nn.Module]:
        # the modules of `badge_exit` or `badge_bypass` by adapter, without the detours of a module's attribute access:
        # a call asks for them at every block
        return self._modules[name]._modules  # type: ignore[union-attr,return-value]

    def remove_hooks(self) -> None:
        """Takes our hooks off the block, which is then as it was."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self.recorders.clear()

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


def adapter_modules(
    config: BadgeConfig, numbers: list[int], exits: list[int], exit_norm: nn.Module
) -> dict[str, nn.Module]:
    """What an adapter has at the block with these `numbers`, by the name of the container that it goes into."""
    assert config.hidden_size is not None  # filled in by BadgeModel
    parts: dict[str, nn.Module] = {}
    own = [m for m in exits if m in numbers or (m == 0 and 1 in numbers)]
    if own:
        parts["badge_exit"] = head = MultiExitHead(
            own, config.exit_type, config.hidden_size, config.resolved_labels, config.exit_dropout
        )
        for m in own:
            if config.carry is not None and m > min(exits):
                head.exit(m).carry = CarriedLogits()
        if config.exit_type == "past_future" and min(exits) in own:
            del head.exit(min(exits)).imitate  # no exit is before it, which might predict its state
    bypassed = [m for m in own if m > 0]
    if config.placement != "none" and bypassed:
        size = (config.hidden_size, config.r, config.activation, config.bias, exit_norm)
        parts["badge_bypass"] = nn.ModuleDict({str(m): Bypass(*size) for m in bypassed})
    if config.learn_to_exit and 1 in numbers:
        parts["badge_doubt"] = nn.Linear(config.hidden_size, 1)
    return parts


def _pool_by(pooler: nn.Module, vector: Tensor) -> Tensor:
    """tanh(dense(vector)) [B, d], in the pooler's own precision inside."""
    weight = getattr(pooler, "weight", None)
    inside = vector
    if isinstance(weight, Tensor) and weight.is_floating_point():  # a quantized one casts on its own
        inside = vector.to(weight)
    return pooler(inside).tanh().to(vector)


@torch.no_grad()
def _start_from_pooler(exits: nn.Module | None, pooler: nn.Module | None) -> None:
    """Makes the dense layers of `pooled` exits copies of the model's own, where it is a plain one of their size."""
    weight, bias = getattr(pooler, "weight", None), getattr(pooler, "bias", None)
    if exits is None or not isinstance(weight, Tensor) or is_quantized(weight):
        return
    for exit_ in exits.children():
        if isinstance(exit_, PooledExit) and exit_.dense.weight.shape == weight.shape:
            exit_.dense.weight.copy_(weight)
            if bias is not None:
                exit_.dense.bias.copy_(bias)


MERGE_ERROR = (
    "BADGE cannot be merged: a bypass feeds its block's exit and never the block, so the base weights have nothing to "
    "take in. Use unload() to get the base model back."
)
