"""One full-depth pass: the base model's forward, with every exit read on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from badge_peft.outputs import MultiExitOutput
from badge_peft.tuner.losses import check_labels, doubt_loss, exit_loss, loss_weights, resolve_problem_type
from badge_peft.tuner.run import ExitRun

if TYPE_CHECKING:
    from badge_peft.model import BadgeModel

_RUN: ContextVar[type[ExitRun]] = ContextVar("badge_peft_run_class", default=ExitRun)
_KEEP: ContextVar[list[ExitRun] | None] = ContextVar("badge_peft_runs", default=None)


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
    if model.compiled is not None:
        kwargs = model.compiled.pad(kwargs)
    if labels is not None:
        problem_type = config.problem_type or resolve_problem_type(config.resolved_labels, labels)
        check_labels(labels, config.resolved_labels, problem_type, batch_size)
        config.problem_type = problem_type  # as transformers does with its own config

    run = model.new_run(_RUN.get(), batch_size, kwargs.get("attention_mask"))
    run.trains_backbone = model.trains_backbone
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
        if run.doubts:
            loss = loss + doubt_loss(run.doubts, run.exit_logits, labels, config.resolved_problem_type)
    output = MultiExitOutput(
        loss=loss,
        logits=logits[-1],
        exit_logits=_stack_logits(logits),
        exit_doubts=_stack_doubts(run, exits),
        hidden_states=base.get("hidden_states"),
        attentions=base.get("attentions"),
    )
    runs = _KEEP.get()
    if runs is not None:
        runs.append(run)
    return output if return_dict is not False else output.to_tuple()


@contextmanager
def full_depth_runs(run: type[ExitRun]) -> Iterator[list[ExitRun]]:
    """Inside, full-depth passes are runs of this class, and the list gets each of them: how training objectives see
    and change what goes on between the blocks, through whatever wraps the model."""
    runs: list[ExitRun] = []
    kind, keep = _RUN.set(run), _KEEP.set(runs)
    try:
        yield runs
    finally:
        _RUN.reset(kind)
        _KEEP.reset(keep)


def _stack_logits(logits: list[Tensor]) -> Tensor:
    """[B, E, K], in the highest precision among the exits: policies decide on these numbers, unrounded."""
    dtype = reduce(torch.promote_types, (x.dtype for x in logits))
    return torch.stack([x.to(logits[-1].device, dtype) for x in logits], dim=1)


def _stack_doubts(run: ExitRun, exits: list[int]) -> Tensor | None:
    """[B, E]; an exit without a doubt (the model's own head, which always answers) has 0."""
    if not run.doubts:
        return None
    like = next(iter(run.doubts.values()))
    return torch.stack([run.doubts.get(m, torch.zeros_like(like)) for m in exits], dim=1)


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
