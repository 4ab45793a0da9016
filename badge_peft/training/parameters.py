"""Two learning rates: a backbone wants about 5e-5, bypasses and exits two hundred times more."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# The rates of docs/results: the best of a search on validation data, for a trained and for a frozen backbone.
BACKBONE_LR = 5e-5
ADAPTER_LR = 1e-2
_NO_DECAY = ("bias", "norm", "layernorm", "layer_norm")


def parameter_groups(
    model: nn.Module,
    adapter_lr: float = ADAPTER_LR,
    backbone_lr: float = BACKBONE_LR,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Trainable parameters in optimiser groups: backbone and adapter, each with and without weight decay.

    The adapter group is what BADGE adds: bypasses and exits. Everything else that is trainable, the model's own head
    among it, was fine-tuned at the backbone's rate before and still is.

    Args:
        model: A PEFT model with a BADGE adapter.
        adapter_lr: Learning rate of bypasses and exits.
        backbone_lr: Learning rate of everything else that is trainable.
        weight_decay: For matrices; biases and norms have none.

    Raises:
        ValueError: nothing is trainable.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "adapter" if ".badge_" in name else "backbone"
            lowered = name.lower()
            decays = parameter.dim() > 1 and not any(word in lowered.split(".") for word in _NO_DECAY)
            groups.setdefault((part, decays), []).append(parameter)
    if not groups:
        raise ValueError("no parameter is trainable: load the adapter with is_trainable=True, or make a new one.")
    rates = {"adapter": adapter_lr, "backbone": backbone_lr}
    return [
        {"params": members, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0, "name": part}
        for (part, decays), members in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def make_optimizer(
    model: nn.Module,
    adapter_lr: float = ADAPTER_LR,
    backbone_lr: float = BACKBONE_LR,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, for `Trainer(optimizers=(make_optimizer(model), None))`: Trainer then adds the
    learning-rate schedule of its arguments to both rates."""
    return torch.optim.AdamW(parameter_groups(model, adapter_lr, backbone_lr, weight_decay))
