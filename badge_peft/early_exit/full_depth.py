"""Full depth: a pass in which no row leaves, and every exit is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from badge_peft.early_exit.readers import ExitReader
from badge_peft.outputs import MultiExitOutput
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.context import Frame
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.losses import exit_loss, loss_weights, uncertainty_loss
from badge_peft.utils.problem import infer_problem_type, problem_of


class FullDepthReader(ExitReader):
    """Collects what every exit of the adapter gives, by block number: logits [B, K] and uncertainty [B] (LTE)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exit_logits: dict[int, Tensor] = {}
        self.exit_uncertainty: dict[int, Tensor] = {}

    def on_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Reads exit `number`, where there is one."""
        if block.has_exit(self.exits.adapter, number):
            self.exit_logits[number], uncertainty = self.read(block, number, frame)
            if uncertainty is not None:
                self.exit_uncertainty[number] = uncertainty


def check_labels(config: BadgeConfig, labels: Tensor, batch_size: int, length: int = 0) -> None:
    """Checks labels of an adapter's task: [B, S] of tokens.

    The problem type of an adapter that nothing has told it yet (K > 1, and the model's config is silent) is read off
    the first labels, as transformers does it, and is saved with the adapter."""
    if config.reads_tokens:
        if labels.shape != (batch_size, length):
            raise ValueError(
                f"labels have shape {list(labels.shape)}, but token classification needs one for each token, "
                f"[{batch_size}, {length}], -100 for those that do not count."
            )
        labels, batch_size = labels.flatten(), labels.numel()
    problem_type = config.problem_type or infer_problem_type(config.resolved_labels, labels)
    problem_of(problem_type).check_labels(labels, config.resolved_labels, batch_size)
    config.problem_type = problem_type


def full_depth_output(
    reader: FullDepthReader,
    base: Any,
    config: BadgeConfig,
    labels: Tensor | None,
    num_items: Any,
    more: dict[str, Tensor],
    length: int | None = None,
) -> MultiExitOutput:
    """The output of a full-depth pass. Of tokens, what compiled blocks have padded behind `length` is cut off."""
    exits, tokens = reader.exits.numbers, reader.exits.reads_tokens
    if config.final_exit == "base_head":
        reader.exit_logits[exits[-1]] = base.logits
    if tokens:
        reader.exit_logits = {m: x[:, :length] for m, x in reader.exit_logits.items()}
        reader.exit_uncertainty = {m: x[:, :length] for m, x in reader.exit_uncertainty.items()}
    logits = [reader.exit_logits[m] for m in exits]
    loss = None
    if labels is not None:
        labels = labels.to(logits[-1].device)
        flat = torch.Tensor.flatten if tokens else _same  # a loss is one of tokens, then
        labels = flat(labels)
        each = {m: x.flatten(0, 1) if tokens else x for m, x in reader.exit_logits.items()}
        losses = [exit_loss(each[m], labels, config.resolved_problem_type, num_items) for m in exits]
        loss = sum_losses(losses, loss_weights(config.exit_weights, exits))
        if reader.exit_uncertainty:
            doubts = {m: flat(x) for m, x in reader.exit_uncertainty.items()}
            loss = loss + uncertainty_loss(doubts, each, labels, config.resolved_problem_type, num_items)
    return MultiExitOutput(
        loss=loss,
        logits=logits[-1],
        exit_logits=_stack_logits(logits),
        exit_uncertainty=_stack_uncertainty(reader.exit_uncertainty, exits),
        hidden_states=base.get("hidden_states"),
        attentions=base.get("attentions"),
        **more,
    )


def _same(values: Tensor) -> Tensor:
    return values


def sum_losses(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m w_m L_m (Eq. 8)."""
    return torch.stack([w * x for w, x in zip(weights, losses, strict=True)]).sum()


def _stack_logits(logits: list[Tensor]) -> Tensor:
    """[B, E, K], in the highest precision among the exits: policies decide on these numbers, unrounded."""
    dtype = reduce(torch.promote_types, (x.dtype for x in logits))
    return torch.stack([x.to(logits[-1].device, dtype) for x in logits], dim=1)


def _stack_uncertainty(found: dict[int, Tensor], exits: list[int]) -> Tensor | None:
    """[B, E]; an exit without one (the model's own head, which always answers) has 0."""
    if not found:
        return None
    like = next(iter(found.values()))
    return torch.stack([found.get(m, torch.zeros_like(like)) for m in exits], dim=1)
