"""The modules that an adapter trains and saves beside its exits (`modules_to_save`), as a rule the model's head."""

from __future__ import annotations

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


class SavedModule(ModulesToSaveWrapper):
    """PEFT's wrapper, whose weights the tuner itself looks up in a file.

    PEFT would do it before the tuner sees the file, and a tensor that is not there would be a bare KeyError.
    """

    other_param_names = ("modules_to_save",)  # what is no weight of the base model, which PEFT reads off the map below

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
