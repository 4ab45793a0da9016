"""`early_exit_forward`: the call that a service makes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixed import mixed_forward
from badge_peft.early_exit.readers import EarlyExitRun, run_fields
from badge_peft.model import BadgeModel
from badge_peft.outputs import EarlyExitOutput
from badge_peft.tuner.full_depth import count_rows

_FIELDS = frozenset(EarlyExitConfig.__dataclass_fields__)
_IGNORED = ("labels", "return_dict", "num_items_in_batch")
_REFUSED = ("output_hidden_states", "output_attentions")


def get_badge_model(model: nn.Module) -> BadgeModel:
    """The `BadgeModel` inside a PEFT model.

    Raises:
        ValueError: there is none.
    """
    inner = model if isinstance(model, BadgeModel) else getattr(model, "base_model", None)
    if not isinstance(inner, BadgeModel):
        raise ValueError(
            f"{type(model).__name__} carries no BADGE adapter: make one with get_peft_model(model, BadgeConfig(...)) "
            "or load one with PeftModel.from_pretrained."
        )
    return inner


@torch.no_grad()
def early_exit_forward(
    model: nn.Module, *, early_exit_config: Any = None, adapter_names: Any = None, **kwargs: Any
) -> EarlyExitOutput:
    """Answers each row at the exit that the policy chooses; the rest of the blocks are not computed for it.

    Row by row, a batch gives the exits and (to rounding) the logits that each row gives alone. Switch the model to
    `eval()` first, as for `generate`: dropout makes exits random.

    Args:
        model: A PEFT model with an active BADGE adapter.
        early_exit_config: `EarlyExitConfig` or dict; None takes the adapter's own.
        adapter_names: A list with the adapter of each row, whichever is active; None: the active one. Rows of
            different tasks share one pass, each with its adapter's bypasses, exits, labels and early-exit config;
            `"__base__"` stands for the base model without an adapter. Only adapters with `backbone="frozen"`, which
            save no module but the model's head.
        **kwargs: The model's inputs (`labels` among them are ignored), and fields of `EarlyExitConfig`, which win over
            the config: `policy="divergence", threshold=0.2, patience=3`.

    Returns:
        `logits` [B, K] and `exit_layer` [B]; with `adapter_names` also `num_labels` [B], and K is the largest.

    Raises:
        ValueError: no BADGE adapter, an empty batch, a wrong field, an argument that has no meaning here, or
            `adapter_names` that do not fit the rows or the model.
    """
    badge = get_badge_model(model)
    overrides = {name: kwargs.pop(name) for name in _FIELDS & kwargs.keys()}
    inputs = {name: value for name, value in kwargs.items() if name not in _IGNORED}
    for name in _REFUSED:
        if inputs.pop(name, None):
            raise ValueError(f"{name} is not supported by early_exit_forward: rows leave at different blocks.")
    _check_names(badge.model, inputs)
    if not badge.adapters_enabled:
        raise ValueError("the adapter is disabled, so there are no exits: leave disable_adapter() first.")
    if badge.training:
        warnings.warn(
            "early_exit_forward in training mode: dropout makes exits random. Call model.eval().", stacklevel=3
        )
    if adapter_names is not None:
        return mixed_forward(badge, adapter_names, early_exit_config, overrides, inputs)
    config = badge.config_of()
    fields = run_fields(config, early_exit_config, overrides)
    batch_size = count_rows(**inputs)
    if badge.compiled is not None:
        inputs = badge.compiled.pad(inputs)
    run = badge.new_run(EarlyExitRun, batch_size, inputs.get("attention_mask"), **fields)
    with run:
        base = badge.model(return_dict=True, **inputs)
    if config.final_exit == "base_head":
        run.finish(base.logits)
    assert run.answer is not None  # every row has answered
    return EarlyExitOutput(logits=run.answer, exit_layer=torch.from_numpy(run.exit_layer).to(run.answer.device))


def _check_names(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Refuses a misspelt field, which models that take `**kwargs` would swallow."""
    known = _arguments(type(model).forward)
    unknown = [name for name, value in inputs.items() if name not in known and not isinstance(value, torch.Tensor)]
    if known and unknown:
        raise ValueError(
            f"{', '.join(unknown)} is neither an argument of {type(model).__name__} nor a field of EarlyExitConfig; "
            f"its fields are {', '.join(EarlyExitConfig.__dataclass_fields__)}."
        )


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    """The names that a model's forward spells out; none where it only passes them on."""
    names = frozenset(inspect.signature(forward).parameters)
    return names if names & {"input_ids", "inputs_embeds"} else frozenset()
