"""The arguments of a call: which are fields of `EarlyExitConfig`, which go to the base model, and their size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import Any

from torch import Tensor, nn

from badge_peft.early_exit.config import EarlyExitConfig

_FIELDS = frozenset((*EarlyExitConfig.__dataclass_fields__, "normalize"))  # the last has been removed
_IGNORED = frozenset(("labels", "return_dict", "num_items_in_batch"))
_REFUSED = ("output_hidden_states", "output_attentions")


def split_arguments(model: nn.Module, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `EarlyExitConfig`, and inputs of the base model. What is neither, a model with `**kwargs` would
    swallow."""
    overrides: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in _FIELDS:
            overrides[name] = value
        elif name not in _IGNORED:
            inputs[name] = value
    for name in _REFUSED:
        if inputs.pop(name, None):
            raise ValueError(f"{name} is not supported by early_exit_forward: rows stop at different blocks.")
    known = _names(type(model).forward)
    if known and not inputs.keys() <= known:
        unknown = [name for name, value in inputs.items() if name not in known and not isinstance(value, Tensor)]
        for name in inputs.keys() - known - set(unknown):
            meant = get_close_matches(name, known, 1, cutoff=0.8)
            if meant:
                raise ValueError(
                    f"{name} is no argument of {type(model).__name__}, which would leave it out: is {meant[0]} meant?"
                )
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} is neither an argument of {type(model).__name__} nor a field of "
                f"EarlyExitConfig; its fields are {', '.join(EarlyExitConfig.__dataclass_fields__)}."
            )
    return overrides, inputs


def input_size(*args: Any, **kwargs: Any) -> tuple[int, int]:
    """B and S, from whatever the base model is called with."""
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    if inputs is None and args:
        inputs = args[0]
    if inputs is None:
        raise ValueError("the model needs input_ids or inputs_embeds.")
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"inputs are {type(inputs).__name__}, and the model needs tensors: torch.tensor(...), or a tokenizer's "
            "return_tensors='pt'."
        )
    if inputs.dim() < 2:
        raise ValueError(
            f"inputs have shape {list(inputs.shape)}, and the model needs [batch, sequence]: unsqueeze(0) one text."
        )
    rows, length = inputs.shape[:2]
    if rows == 0 or length == 0:
        raise ValueError(f"the batch is empty: its inputs have shape {list(inputs.shape)}.")
    return rows, length


def check_special(mask: Any, batch_size: int, length: int) -> Tensor | None:
    """[B, S], the tokens that need no answer; None: there are none."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch_size, length)):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"special_tokens_mask must be a tensor [{batch_size}, {length}], as the inputs, got {found}: a tokenizer "
            "makes it with return_special_tokens_mask=True."
        )
    return mask


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the base model with positional ones by their names, as far as its forward spells them out."""
    names = positional(type(model).forward)
    if len(args) > len(names) or kwargs.keys() & names[: len(args)]:
        return args, kwargs  # torch says what is wrong
    return (), {**dict(zip(names, args, strict=False)), **kwargs}


@cache
def positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the positional arguments of a module's forward, `self` left out."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


@cache
def _names(forward: Callable[..., Any]) -> frozenset[str]:
    """The arguments that a model's forward spells out; none where it only passes them on."""
    names = frozenset(inspect.signature(forward).parameters)
    return names if names & {"input_ids", "inputs_embeds"} else frozenset()
