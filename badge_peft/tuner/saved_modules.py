"""The modules that an adapter trains with its exits (`modules_to_save`, as a rule the model's head), in a call of
several adapters: each row, or each task, goes through the copy of its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.context import current_pass


def watch_saved_modules(model: nn.Module) -> None:
    """Puts `answer_by_adapters` on each of PEFT's wrappers in `model`, once, and leaves the names of its tensors in a
    file to `saved_names`. Both go with the wrapper."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and answer_by_adapters not in module._forward_hooks.values():
            module.register_forward_hook(answer_by_adapters, with_kwargs=True)
            # where a file lacks one of the names PEFT would fail with a KeyError, before `BadgeModel` sees the file
            module.adapter_state_dict_load_map = _no_names  # type: ignore[method-assign]  # of this one
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


def has_own_labels(model: nn.Module, config: BadgeConfig, layout: BlockLayout) -> bool:
    """Whether the adapter's copy of the model's head has another number of labels than the model."""
    reads_copy = config.final_exit == "base_head" and config.train_head and bool(layout.head)
    return reads_copy and config.num_labels != getattr(model.config, "num_labels", config.num_labels)


def resized(head: nn.Module, num_labels: int, std: float = 0.02) -> nn.Module:
    """A head, whose last linear layer gives logits, with another number of labels: itself, or what takes its place.
    The new weights are normally distributed."""
    name, old = next((n, part) for n, part in reversed([*head.named_modules()]) if isinstance(part, nn.Linear))
    weight = old.weight
    new = nn.Linear(old.in_features, num_labels, old.bias is not None, device=weight.device, dtype=weight.dtype)
    nn.init.normal_(new.weight, std=std)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    new.requires_grad_(weight.requires_grad).train(old.training)
    if not name:
        return new
    parent, _, leaf = name.rpartition(".")
    setattr(head.get_submodule(parent), leaf, new)
    return head


# ----------------------------------------------------------------------------------------- who answers with which copy


class RowHeads:
    """Each row is of one adapter: `adapter_rows` has how many rows each has, in the order of the batch."""

    def __init__(self, adapter_rows: Sequence[tuple[str, int]]) -> None:
        self.names = [name for name, _ in adapter_rows]
        self.counts = [rows for _, rows in adapter_rows]

    def answer(self, wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What each row's own copy makes of it, [B, *]; of the logits of adapters with fewer labels the last are 0."""
        if not any(name in wrapper.modules_to_save for name in self.names):
            return wrapper.original_module(*args, **kwargs)
        (states,) = args
        parts = states.split(self.counts)
        made = [_copy(wrapper, name)(part, **kwargs) for name, part in zip(self.names, parts, strict=True)]
        widest = max(x.shape[-1] for x in made)
        return torch.cat([F.pad(x, (0, widest - x.shape[-1])) if x.shape[-1] < widest else x for x in made])

    def logits(self, logits: Tensor) -> dict[str, Tensor]:
        """Of the model's logits [B, K] the rows of each adapter."""
        return dict(zip(self.names, logits.split(self.counts), strict=True))


class TaskHeads:
    """Each row is of all tasks that answer at the model's own head. `asks` says whether one still has rows without an
    answer, `last` is the module that gives the model's logits, where it names one."""

    def __init__(self, asks: Mapping[str, Callable[[], bool]], last: nn.Module | None) -> None:
        self.asks = asks
        self.tasks = list(asks)
        self.last = last
        self._apart = False  # whether tasks lie one below the other, in rows [T B, *]
        self._labels: list[int] | None = None  # K of each, where their logits lie side by side

    def answer(self, wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the tasks' copies make of the rows: of the module that gives the logits [B, K_1 + K_2 + ...], of one
        before it [T B, *]. What lies between two of them acts on each row alone."""
        if not any(task in wrapper.modules_to_save for task in self.tasks):
            return wrapper.original_module(*args, **kwargs)
        (states,) = args
        parts = self._by_rows(states)
        heads = [_copy(wrapper, task) for task in self.tasks]
        if wrapper is not self.last:
            self._apart = True
            return torch.cat([head(part, **kwargs) for head, part in zip(heads, parts, strict=True)])
        made = [
            head(part, **kwargs) if self.asks[task]() else part.new_zeros(*part.shape[:-1], 1)
            for task, head, part in zip(self.tasks, heads, parts, strict=True)
        ]
        self._labels = [x.shape[-1] for x in made]
        return torch.cat(made, dim=-1)

    def logits(self, logits: Tensor) -> dict[str, Tensor]:
        """Of the model's logits those of each task, [B, K]; without meaning where a task does not ask any more."""
        parts = self._by_rows(logits)
        if self._labels is not None:
            ends = list(accumulate(self._labels))
            parts = [logits[..., end - k : end] for end, k in zip(ends, self._labels, strict=True)]
        return dict(zip(self.tasks, parts, strict=True))

    def _by_rows(self, values: Tensor) -> list[Tensor]:
        """[T B, *] by task, or for each [B, *]; in slices, which have an ONNX form for any B."""
        if not self._apart:
            return [values] * len(self.tasks)
        rows = values.shape[0] // len(self.tasks)
        return [values[i * rows : (i + 1) * rows] for i in range(len(self.tasks))]


def answer_by_adapters(
    wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor | None:
    """A forward hook: what the adapters' copies make of it; None (the output stays) in a call of one adapter.

    In a call of several adapters the module is a head, whose one argument has a row for each of the batch.
    """
    run = None if torch.compiler.is_dynamo_compiling() else current_pass()  # an export is traced as it runs
    return None if run is None or run.heads is None else run.heads.answer(wrapper, args, kwargs)


def _copy(wrapper: ModulesToSaveWrapper, adapter: str) -> nn.Module:
    return wrapper.modules_to_save[adapter] if adapter in wrapper.modules_to_save else wrapper.original_module
