"""The modules that an adapter trains with its exits (`modules_to_save`, as a rule the model's head), in a call with
rows of several adapters: each row goes through the copy of its own adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from badge_peft.tuner.context import current_pass


def watch_saved_modules(model: nn.Module) -> None:
    """Puts `answer_by_rows` on each of PEFT's wrappers in `model`, once, and leaves the names of its tensors in a file
    to `saved_names`. Both go with the wrapper."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and answer_by_rows not in module._forward_hooks.values():
            module.register_forward_hook(answer_by_rows, with_kwargs=True)
            # where a file lacks one of the names PEFT would fail with a KeyError, before `BadgeModel` sees the file
            module.adapter_state_dict_load_map = _no_names  # type: ignore[method-assign]
            module.other_param_names = ("modules_to_save",)


def saved_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The names in a file of the tensors of the adapter's copies, each with that in `model`."""
    return {
        f"{name}.{key}": f"{name}.{ours}"
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, ours in ModulesToSaveWrapper.adapter_state_dict_load_map(module, adapter_name).items()
    }


def _no_names(adapter_name: str) -> dict[str, str]:
    return {}


def answer_by_rows(
    wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor | None:
    """A forward hook: what each row's own copy makes of it, [B, *]; None (the output stays) in a call of one adapter.

    In a call of several adapters the module is a head, whose one argument has a row for each of the batch.
    """
    run = None if torch.compiler.is_compiling() else current_pass()
    if run is None or run.adapter_rows is None:
        return None
    if not any(adapter in wrapper.modules_to_save for adapter, _ in run.adapter_rows):
        return wrapper.original_module(*args, **kwargs)
    (states,) = args
    parts = states.split([rows for _, rows in run.adapter_rows])
    copies = [_copy(wrapper, name) for name, _ in run.adapter_rows]
    return torch.cat([copy(part, **kwargs) for copy, part in zip(copies, parts, strict=True)])


def _copy(wrapper: ModulesToSaveWrapper, adapter: str) -> nn.Module:
    return wrapper.modules_to_save[adapter] if adapter in wrapper.modules_to_save else wrapper.original_module
