"""The modules that an adapter trains and saves beside its exits (`modules_to_save`), as a rule the model's head."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from badge_peft.tuner.run import current_run


class SavedModule(ModulesToSaveWrapper):
    """PEFT's wrapper, but for two things: in a batch of several adapters each row goes through the copy of its own,
    and the tuner itself looks up the weights in a file. (PEFT would do it before the tuner sees the file, and a tensor
    that is not there would be a bare KeyError.)
    """

    other_param_names = ("modules_to_save",)  # what is no weight of the base model, which PEFT reads off the map below

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module. In a batch of several adapters it is a head, and its one argument has a row for each."""
        run = None if torch.compiler.is_compiling() else current_run()
        if run is None or run.shares is None:
            return super().forward(*args, **kwargs)
        if not any(adapter in self.modules_to_save for adapter, _ in run.shares):
            return self.original_module(*args, **kwargs)
        (states,) = args
        parts = states.split([rows for _, rows in run.shares])
        copies = [self._copy(adapter) for adapter, _ in run.shares]
        return torch.cat([copy(part, **kwargs) for copy, part in zip(copies, parts, strict=True)])

    def _copy(self, adapter: str) -> nn.Module:
        return self.modules_to_save[adapter] if adapter in self.modules_to_save else self.original_module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Nothing for PEFT to translate."""
        return {}

    def load_map(self, adapter_name: str) -> dict[str, str]:
        """Names in a file -> names here, both below this module; empty where the adapter has no copy of it."""
        return super().adapter_state_dict_load_map(adapter_name)


def take_over(model: nn.Module) -> None:
    """Makes PEFT's wrappers in `model` ours: PEFT has no place to say which class it should use."""
    for module in model.modules():
        if type(module) is ModulesToSaveWrapper:
            module.__class__ = SavedModule


def file_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Names in a file -> names in `model`, of all tensors in the saved modules of an adapter."""
    return {
        f"{name}.{there}": f"{name}.{here}"
        for name, module in model.named_modules()
        if isinstance(module, SavedModule)
        for there, here in module.load_map(adapter_name).items()
    }


def rename(model: nn.Module, adapter_name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with the names of the saved modules as they are in `model`."""
    names = file_names(model, adapter_name)
    return {names.get(key, key): value for key, value in weights.items()}
