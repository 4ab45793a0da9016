"""Learning rates by part: a backbone needs about 5e-5, bypasses and exits fifty times more."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from badge_peft.model import get_badge_model
from badge_peft.training.conditioning import Conditioning

ADAPTER_LR = 2.5e-3  # of standardized inputs: docs/decisions/learning-rates.md
BACKBONE_LR = {"frozen": 5e-5, "lora": 1e-3, "full": 5e-5}  # by backbone mode
_PARTS = ("backbone", "head", "adapter")


def parameter_groups(
    model: nn.Module,
    adapter_lr: float | None = None,
    backbone_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Trainable parameters in optimizer groups: backbone, the model's own head, and adapter (bypasses and exits), each
    with and without weight decay.

    Args:
        model: A PEFT model with a BADGE adapter.
        adapter_lr: Learning rate of bypasses and exits; None is 2.5e-3.
        backbone_lr: Of the backbone or its LoRA; None is 5e-5, for a LoRA 1e-3.
        head_lr: Of the model's own head, where it is trained; None is the backbone's rate when the backbone is trained
            with it, else a tenth of the adapter's.
        weight_decay: For matrices; biases and norms have none.

    Raises:
        ValueError: nothing is trainable.
    """
    config = get_badge_model(model).config_of()
    mode = config.backbone
    adapter_lr = ADAPTER_LR if adapter_lr is None else adapter_lr
    backbone_lr = BACKBONE_LR[mode] if backbone_lr is None else backbone_lr
    if head_lr is None:
        head_lr = backbone_lr if mode == "full" else adapter_lr / 10
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((_part(name), parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise ValueError("no parameter is trainable: load the adapter with is_trainable=True, or make a new one.")
    rates = dict(zip(_PARTS, (backbone_lr, head_lr, adapter_lr), strict=True))
    return [
        {
            "params": groups[part, matrix],
            "lr": rates[part],
            "weight_decay": weight_decay if matrix else 0.0,
            "name": part,
        }
        for part in _PARTS
        for matrix in (True, False)
        if (part, matrix) in groups
    ]


def make_optimizer(model: nn.Module, *rates: float | None, **named_rates: float | None) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, which takes the same arguments, in the coordinates of `Conditioning`, for
    `Trainer(optimizers=(make_optimizer(model), None))`: Trainer then adds the learning-rate schedule of its arguments
    to every rate."""
    optimizer = torch.optim.AdamW(parameter_groups(model, *rates, **named_rates))  # type: ignore[arg-type]  # of its groups
    Conditioning(get_badge_model(model), optimizer)
    return optimizer


def _part(name: str) -> str:
    if ".badge_" in name:
        return "adapter"
    return "head" if ".modules_to_save." in name else "backbone"
