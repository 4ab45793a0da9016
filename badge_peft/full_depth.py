"""One full-depth pass: the base model's forward, with every exit read on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from badge_peft.losses import check_labels, exit_loss, loss_weights, resolve_problem_type
from badge_peft.outputs import MultiExitOutput
from badge_peft.prepare import pooling_kind
from badge_peft.run import ExitRun

if TYPE_CHECKING:
    from badge_peft.model import BadgeModel


def full_depth_forward(model: BadgeModel, *args: Any, **kwargs: Any) -> Any:
    """`BadgeModel.forward`; see there."""
    if not model.adapters_enabled:
        return model.model(*args, **kwargs)
    adapter = model.single_active_adapter()
    config = model.config_of(adapter)
    labels = kwargs.pop("labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    return_dict = kwargs.pop("return_dict", None)
    batch_size = count_rows(*args, **kwargs)
    if labels is not None:
        problem_type = config.problem_type or resolve_problem_type(config.resolved_labels, labels)
        check_labels(labels, config.resolved_labels, problem_type, batch_size)
        config.problem_type = problem_type  # as transformers does with its own config

    run = ExitRun(adapter, batch_size, kwargs.get("attention_mask"), pooling_kind(model.model, config))
    with run:
        base = model.model(*args, return_dict=True, **kwargs)
    exits = model.exit_layers(adapter)
    if config.final_exit == "base_head":
        run.exit_logits[exits[-1]] = base.logits
    logits = [run.exit_logits[m] for m in exits]

    loss = None
    if labels is not None:
        weights = loss_weights(config.exit_weights, exits)
        labels = labels.to(logits[-1].device)
        losses = [exit_loss(x, labels, config.resolved_problem_type, num_items) for x in logits]
        loss = sum_losses(losses, weights)
    output = MultiExitOutput(
        loss=loss,
        logits=logits[-1],
        exit_logits=torch.stack([x.to(logits[-1].device, logits[-1].dtype) for x in logits], dim=1),
        hidden_states=base.get("hidden_states"),
        attentions=base.get("attentions"),
    )
    return output if return_dict is not False else output.to_tuple()


def sum_losses(losses: list[Tensor], weights: list[float]) -> Tensor:
    """sum_m w_m L_m (Eq. 8)."""
    return torch.stack([w * x for w, x in zip(weights, losses, strict=True)]).sum()


def count_rows(*args: Any, **kwargs: Any) -> int:
    """B, from whatever the base model is called with.

    Raises:
        ValueError: neither `input_ids` nor `inputs_embeds` is there, or the batch is empty.
    """
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    if inputs is None and args:
        inputs = args[0]
    if inputs is None:
        raise ValueError("the model needs input_ids or inputs_embeds.")
    if inputs.shape[0] == 0 or inputs.shape[1] == 0:
        raise ValueError(f"the batch is empty: its inputs have shape {list(inputs.shape)}.")
    return int(inputs.shape[0])
