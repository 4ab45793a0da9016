"""Which weights an adapter's file holds, and the checks when it is read back."""

from __future__ import annotations

import re

from torch import Tensor, nn

from badge_peft.registry import PREFIX
from badge_peft.tuner.backbone import is_own_weight
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.lora import is_adapter_key
from badge_peft.tuner.saved_modules import file_names


def adapter_state_dict(config: BadgeConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `state_dict` that belong to the adapter: its bypasses and exits, and the backbone's LoRA or the
    trained backbone itself, which they are never separated from. (PEFT adds `modules_to_save`.)"""
    ours = re.compile(rf"\.{PREFIX}[a-z]+\.{re.escape(adapter_name)}\.")
    chosen = {key: value for key, value in state_dict.items() if ours.search(key)}
    if config.backbone == "lora":
        chosen.update({key: value for key, value in state_dict.items() if is_adapter_key(key, adapter_name)})
    if config.backbone == "full":
        chosen.update({key: value for key, value in state_dict.items() if is_own_weight(key)})
    return chosen


def check_complete(model: nn.Module, config: BadgeConfig, adapter_name: str, weights: dict[str, Tensor]) -> None:
    """Refuses a file that does not fill the adapter: an exit with random weights answers at chance, in silence.

    Args:
        model: The PEFT model, with the adapter in place.
        config: The adapter's config.
        adapter_name: Its name.
        weights: The file's tensors under the model's names.

    Raises:
        ValueError: a tensor is missing, or has another shape.
    """
    here = model.state_dict()
    expected = {*adapter_state_dict(config, adapter_name, here), *file_names(model, adapter_name).values()}
    missing = sorted(expected - set(weights))
    if missing:
        raise ValueError(
            f"the adapter file lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}: it is damaged, or "
            "adapter_config.json belongs to another adapter."
        )
    for key, value in weights.items():
        if key in here and here[key].shape != value.shape:
            raise ValueError(
                f"{key} has shape {list(value.shape)} in the adapter file and {list(here[key].shape)} here: "
                "adapter_config.json does not belong to this file, or the base model is another one."
            )
