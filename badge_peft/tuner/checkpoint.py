"""What an adapter's file holds: chosen when it is saved, and compared before a model is changed for it.

PEFT puts an adapter on the model, reads its weights only then, and takes whatever name fits. A file that lacks a
tensor would leave an exit with random weights, which answers at chance, and one that has a tensor too many would write
over the base model, in silence.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from badge_peft.registry import PREFIX
from badge_peft.tuner.adapter_file import CONFIG_TENSOR, config_tensor, weights_hash
from badge_peft.tuner.architectures import BlockLayout, base_name, block_names, exit_norm
from badge_peft.tuner.backbone import is_own_weight
from badge_peft.tuner.config import BadgeConfig, own_exits
from badge_peft.tuner.layer import adapter_modules
from badge_peft.tuner.lora import lora_config, lora_tensors
from badge_peft.tuner.saved_modules import has_own_labels, resized, saved_names

#: dtypes of the weights that an adapter is trained in. Others (float8, integers, complex) would be cast in silence.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def adapter_state_dict(config: BadgeConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `state_dict` that belong to the adapter: its bypasses and exits, and the backbone's LoRA or the
    trained backbone itself, which they are never separated from. (PEFT adds `modules_to_save`.)"""
    kinds = rf"{PREFIX}[a-z]+|lora_\w+" if config.backbone == "lora" else rf"{PREFIX}[a-z]+"
    ours = re.compile(rf"\.(?:{kinds})\.{re.escape(adapter_name)}(?:\.|$)")
    full = config.backbone == "full"
    return {key: value for key, value in state_dict.items() if ours.search(key) or (full and is_own_weight(key))}


def saved_state_dict(
    config: BadgeConfig, adapter_name: str, state_dict: dict[str, Tensor], base_name: str | None
) -> dict[str, Tensor]:
    """`adapter_state_dict`, and the config as PEFT writes it afterwards: the file says what it is by itself, should
    the saving end in between. (`base_name` is that of the base model, where the config has none yet.)"""
    base = config.base_model_name_or_path or base_name or None
    fields = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": base, "weights_hash": None}
    return {**adapter_state_dict(config, adapter_name, state_dict), CONFIG_TENSOR: config_tensor(fields)}


def check_file(model: nn.Module, config: BadgeConfig, layout: BlockLayout) -> None:
    """Compares the file of a config that was read with what the adapter will have on `model`, which is left as it is.
    Without a file of weights its `source` becomes None."""
    if config.source is None:
        return
    found = config.source.read_tensors()
    if found is None:
        config.source = None
        return
    named = {base_name(name): value for name, value in found.items() if name != CONFIG_TENSOR}
    expected = _expected_tensors(model, config, layout)
    _compare(expected, named, {**_embeddings(model), **_unread(config, expected)})
    if config.weights_hash is not None and weights_hash(found) != config.weights_hash:
        raise ValueError(
            f"the weights in {config.source.path} are not those that its adapter_config.json was saved with: one of "
            "the two files was replaced. Save the adapter again; if you changed the weights on purpose, set "
            "weights_hash to null in adapter_config.json."
        )


def check_weights(model: nn.Module, config: BadgeConfig, adapter_name: str, weights: dict[str, Tensor]) -> None:
    """Compares the file's tensors, under the model's names, with what the adapter has on `model`, the PEFT model."""
    here = model.state_dict()
    expected = adapter_state_dict(config, adapter_name, here)
    expected.update({name: here[name] for name in saved_names(model, adapter_name).values()})
    _compare(expected, weights, _embeddings(model))


def keep_unread(model: nn.Module, config: BadgeConfig, adapter_name: str, weights: Mapping[str, Tensor]) -> None:
    """Makes room, as buffers, for the layer of `_unread` where `weights`, under the file's names, have it: it is part
    of their hash, which ties what was measured to them."""
    for name, dense in _unread(config, adapter_state_dict(config, adapter_name, model.state_dict())).items():
        if name.replace(f".badge_exit.{adapter_name}.", ".badge_exit.") in weights:
            place, _, part = name.rpartition(".")
            first_exit = model.get_submodule(place.rpartition(".")[0])
            if not hasattr(first_exit, "imitate"):
                first_exit.imitate = nn.Module()
            cast(nn.Module, first_exit.imitate).register_buffer(part, torch.empty_like(dense))


def _unread(config: BadgeConfig, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer of the first exit of `past_future` that older versions saved and none reads: names and shapes."""
    first = 1 if config.exit_layers is None else config.exit_layers[0]
    found = {name: t for name, t in expected.items() if ".badge_exit." in name and f".{first}.dense." in name}
    is_there = config.exit_type == "past_future"
    return {name.replace(".dense.", ".imitate."): t for name, t in found.items() if is_there}


def materialize(model: nn.Module, names: Iterable[str]) -> None:
    """Gives tensors of `model` that are on "meta" (`low_cpu_mem_usage`) a place beside the model's own weights. PEFT
    copies what it loads into the tensors that there are, which on "meta" would change nothing."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    for name in names:
        place, _, part = name.rpartition(".")
        parameters = model.get_submodule(place)._parameters
        found = parameters.get(part)
        if found is not None and found.device.type == "meta":
            parameters[part] = nn.Parameter(torch.empty_like(found, device=device), found.requires_grad)


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], optional: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(
            f"the adapter file lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}: it is damaged, or "
            "adapter_config.json belongs to another adapter."
        )
    surplus = sorted(found.keys() - expected.keys() - optional.keys())
    if surplus:
        raise ValueError(
            f"the adapter file has {len(surplus)} tensors that its config does not name, first {surplus[0]}, which "
            "would be written over the model's own: it has been changed, or adapter_config.json belongs to another "
            "adapter."
        )
    for name, value in found.items():
        here = expected.get(name, optional.get(name))
        assert here is not None
        if here.shape != value.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)} in the adapter file and {list(here.shape)} here: "
                "adapter_config.json does not belong to this file, or the base model is another one."
            )
        if value.dtype not in (FLOATS if here.is_floating_point() else (here.dtype,)):
            allowed = ", ".join(map(str, FLOATS)) if here.is_floating_point() else here.dtype
            raise ValueError(
                f"{name} is {value.dtype} in the adapter file; allowed is {allowed}. Save the adapter again."
            )
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{name} in the adapter file has values that are not finite numbers: its training has failed. Train "
                "again, with a smaller learning rate, or take an earlier checkpoint."
            )


def _expected_tensors(model: nn.Module, config: BadgeConfig, layout: BlockLayout) -> dict[str, Tensor]:
    """What the file of an adapter with this config holds, by the base model's names, most of it on "meta"."""
    blocks = block_names(model, layout)
    exits = own_exits(config, len(blocks))
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(blocks):
        numbers = [m for m, block in enumerate(blocks, start=1) if block == name]
        with torch.device("meta"):
            parts = adapter_modules(config, numbers, exits, exit_norm(model, name, layout))
        for kind, part in parts.items():
            tensors.update({f"{name}.{kind}.{key}": value for key, value in part.state_dict().items()})
    if config.backbone == "lora":
        lora = lora_tensors(model, lora_config(config.lora, layout), blocks)
        tensors.update({base_name(name): value for name, value in lora.items()})
    if config.backbone == "full":
        own = {name: value for name, value in model.state_dict().items() if is_own_weight(name)}
        tensors.update({base_name(name): value for name, value in own.items()})
    for name, module in model.named_modules():
        if any(name.endswith(saved) for saved in config.modules_to_save or ()):  # as PEFT looks for them
            module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            if has_own_labels(model, config, layout) and name == layout.head[-1]:
                module = resized(copy.deepcopy(module).to("meta"), config.resolved_labels)
            tensors.update({base_name(f"{name}.{key}"): value for key, value in module.state_dict().items()})
    return tensors


def _embeddings(model: Any) -> dict[str, Tensor]:
    """What PEFT also saves, on demand or after the vocabulary has grown, by the names in `model`."""
    try:
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # a model that does not say
        return {}
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if any(module is layer for layer in layers)
        for key, value in module.state_dict().items()
    }
