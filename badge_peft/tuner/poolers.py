"""The model's own pooler: a dense layer and a tanh between the states and its head."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from badge_peft.tuner.architectures import BlockLayout, backbone_name
from badge_peft.tuner.exits import PooledExit
from badge_peft.tuner.preconditions import is_quantized


def own_pooler(model: nn.Module, layout: BlockLayout, adapter_name: str | None = None) -> nn.Module | None:
    """The dense layer of the model's pooler, or the copy of it that this adapter trains with the head; None where it
    has none."""
    if layout.pooler is None:
        return None
    for root in (model.get_submodule(backbone_name(model)), model):
        found: Any = root
        for part in layout.pooler.split("."):
            found = getattr(found, part, None)
            if isinstance(found, ModulesToSaveWrapper):
                saved: Any = found.modules_to_save
                has_own = adapter_name is not None and adapter_name in saved
                found = saved[adapter_name] if has_own else found.original_module
        if isinstance(found, nn.Module):
            return found
    return None


def pool_by(pooler: nn.Module, vector: Tensor) -> Tensor:
    """tanh(dense(vector)) [B, d], in the pooler's own precision inside."""
    weight = getattr(pooler, "weight", None)
    inside = vector
    if isinstance(weight, Tensor) and weight.is_floating_point():  # a quantized one casts on its own
        inside = vector.to(weight)
    return pooler(inside).tanh().to(vector)


@torch.no_grad()
def start_from_pooler(exits: nn.Module | None, pooler: nn.Module | None) -> None:
    """Makes the dense layers of `pooled` exits copies of the model's own, where it is a plain one of their size."""
    weight, bias = getattr(pooler, "weight", None), getattr(pooler, "bias", None)
    if exits is None or not isinstance(weight, Tensor) or is_quantized(weight):
        return
    for exit_ in exits.children():
        if isinstance(exit_, PooledExit) and exit_.dense.weight.shape == weight.shape:
            exit_.dense.weight.copy_(weight)
            if bias is not None:
                exit_.dense.bias.copy_(bias)
