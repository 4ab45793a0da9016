"""What a call of `early_exit_forward` may be given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from badge_peft.early_exit.config import EarlyExitConfig

_FIELDS = frozenset(EarlyExitConfig.__dataclass_fields__)
_IGNORED = ("labels", "return_dict", "num_items_in_batch")
_REFUSED = ("output_hidden_states", "output_attentions")


def split_arguments(model: nn.Module, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `EarlyExitConfig`, and inputs of the base model.

    Args:
        model: The base model.
        arguments: Of the call.

    Raises:
        ValueError: an argument that has no meaning where rows leave at different blocks, or one that is neither, which
            models that take `**kwargs` would swallow.
    """
    overrides = {name: arguments[name] for name in _FIELDS & arguments.keys()}
    inputs = {name: value for name, value in arguments.items() if name not in _IGNORED and name not in overrides}
    for name in _REFUSED:
        if inputs.pop(name, None):
            raise ValueError(f"{name} is not supported by early_exit_forward: rows leave at different blocks.")
    known = _names(type(model).forward)
    unknown = [name for name, value in inputs.items() if name not in known and not isinstance(value, Tensor)]
    for name in inputs.keys() - known - set(unknown):
        meant = get_close_matches(name, known, 1, cutoff=0.8)
        if meant:
            raise ValueError(
                f"{name} is no argument of {type(model).__name__}, which would leave it out: is {meant[0]} meant?"
            )
    if known and unknown:
        raise ValueError(
            f"{', '.join(unknown)} is neither an argument of {type(model).__name__} nor a field of EarlyExitConfig; "
            f"its fields are {', '.join(EarlyExitConfig.__dataclass_fields__)}."
        )
    return overrides, inputs


def split_special(mask: Any, batch_size: int, length: int) -> Tensor:
    """[B, S], the tokens that need no answer; without a mask there are none.

    Raises:
        ValueError: the mask has another shape.
    """
    if mask is None:
        return torch.zeros(batch_size, length, dtype=torch.long)
    if not isinstance(mask, Tensor) or mask.shape != (batch_size, length):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"special_tokens_mask must be a tensor [{batch_size}, {length}], as the inputs, got {found}: a tokenizer "
            "makes it with return_special_tokens_mask=True."
        )
    return mask


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the base model with positional ones by their names, as far as its forward spells them out."""
    names = _positions(type(model).forward)
    if len(args) > len(names) or kwargs.keys() & names[: len(args)]:
        return args, kwargs  # torch says what is wrong
    return (), {**dict(zip(names, args, strict=False)), **kwargs}


@cache
def _positions(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


@cache
def _names(forward: Callable[..., Any]) -> frozenset[str]:
    """The arguments that a model's forward spells out; none where it only passes them on."""
    names = frozenset(inspect.signature(forward).parameters)
    return names if names & {"input_ids", "inputs_embeds"} else frozenset()
