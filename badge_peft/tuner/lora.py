"""`backbone="lora"`: a PEFT LoRA inside the blocks, one adapter with the bypasses and exits that it is trained with.

The LoRA layers are PEFT's own. Here stands only what makes them one with our adapter: when they are put in, switched,
deleted and taken out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn

from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.layer import BadgeBlock

_LORA = re.compile(r"\.lora_\w+\.")
_STAND_IN = "stand_in"  # the name of an adapter that is never used


def lora_config(fields: dict[str, Any] | None, layout: BlockLayout) -> LoraConfig:
    """The LoRA that a `BadgeConfig.lora` describes; None is r=8, alpha=16, dropout 0.05. Without `target_modules` it
    adapts queries and values, as PEFT does by default."""
    fields = dict({"r": 8, "lora_alpha": 16, "lora_dropout": 0.05} if fields is None else fields)
    if not fields.get("target_modules"):
        fields["target_modules"] = list(layout.lora_targets)
    return LoraConfig(**fields)


def inject(model: nn.Module, adapter_name: str, config: LoraConfig, blocks: list[str], inference: bool) -> None:
    """Puts the LoRA of `adapter_name` into the blocks, which may be wrapped by us or not; others are left alone."""
    with _unwrapped(model):
        before = model.__dict__.pop("peft_config", None)  # or the new LoraModel would add itself to ours
        heads = [p for name, p in model.named_parameters() if ".modules_to_save." in name and p.requires_grad]
        try:
            targets = list(_targets(model, config, blocks))
            bound = LoraConfig(**{**config.to_dict(), "target_modules": targets, "inference_mode": inference})
            LoraModel(model, {adapter_name: bound}, adapter_name)
            for layer in lora_layers(model):  # a new layer is in training mode, whatever its model is in
                cast(nn.Module, layer).train(layer.get_base_layer().training)
        finally:
            for parameter in heads:  # of the adapters before, which it has frozen with the base model
                parameter.requires_grad = True
            model.__dict__.pop("peft_config", None)
            if before is not None:
                model.peft_config = before


def lora_tensors(model: nn.Module, config: LoraConfig, blocks: list[str]) -> dict[str, Tensor]:
    """What a LoRA would add to `model`, on "meta", by its names in a file: PEFT puts it on stand-ins of its
    targets."""
    with _unwrapped(model):
        targets = _targets(model, config, blocks)
    stand_ins = nn.Module()
    for name, module in targets.items():
        parent = stand_ins
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = cast(nn.Module, getattr(parent, part))
        parent.add_module(name.rpartition(".")[2], _stand_in(module))
    bound = LoraConfig(**{**config.to_dict(), "target_modules": list(targets), "init_lora_weights": False})
    with torch.device("meta"):
        LoraModel(stand_ins, {_STAND_IN: bound}, _STAND_IN)
    return {
        name.replace(f".{_STAND_IN}", ""): value for name, value in stand_ins.state_dict().items() if is_lora(name)
    }


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The LoRA layers inside of `model`."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def set_active(model: nn.Module, adapter_names: list[str], inference_mode: bool) -> None:
    """Makes the LoRA of the given adapters the active ones; an adapter without one switches them all off."""
    for layer in lora_layers(model):
        known = set(layer.lora_A) | set(layer.lora_embedding_A)
        layer.set_adapter([name for name in adapter_names if name in known], inference_mode=inference_mode)


def is_lora(key: str) -> bool:
    """Whether a parameter is of a LoRA of PEFT's, as ours are: there, something follows the parameter's name. (In
    other libraries' LoRAs, which are part of the backbone, nothing does.)"""
    return _LORA.search(key) is not None


def _targets(model: nn.Module, config: LoraConfig, blocks: list[str]) -> dict[str, nn.Module]:
    """The modules inside of the blocks that the LoRA adapts, by name."""
    prefixes = tuple(f"{name}." for name in blocks)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer))
    targets = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefixes) and not name.startswith(inside) and _targeted(config, name, module)
    }
    if not targets:
        raise ValueError(f"lora target_modules={config.target_modules!r} match no module inside of the blocks.")
    return targets


def _stand_in(module: nn.Module) -> nn.Module:
    """A module of the same shape on "meta"."""
    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    if isinstance(module, nn.Linear):  # quantized ones, too
        return nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    return copy.deepcopy(module, memo)


def _targeted(config: LoraConfig, name: str, module: nn.Module) -> bool:
    targets = config.target_modules
    if targets == "all-linear":
        return isinstance(module, (nn.Linear, LoraLayer))
    if isinstance(targets, str):
        return bool(LoraModel._check_target_module_exists(config, name))
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


@contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """PEFT never looks for targets inside of another tuner's layers, so ours step aside."""
    places = []
    for name, module in list(model.named_modules()):
        if isinstance(module, BadgeBlock):
            parent = model.get_submodule(name.rpartition(".")[0])
            places.append((parent, name.rpartition(".")[2], module))
    try:
        for parent, child, block in places:
            setattr(parent, child, block.base_layer)
        yield
    finally:
        for parent, child, block in places:
            setattr(parent, child, block)
