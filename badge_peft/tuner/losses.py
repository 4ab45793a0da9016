"""The loss of one exit and the weighted sum over all of them (Eq. 8)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.utils.checks import check_choice, is_number, require
from badge_peft.utils.problem import NO_LABEL, problem_of


def exit_loss(logits: Tensor, labels: Tensor, problem_type: str, num_items: Any = None) -> Tensor:
    """Loss of one exit's logits [B, K], as transformers computes it for its own head. Of `num_items` labels in the
    whole accumulated batch it is the sum over that number (Trainer's `num_items_in_batch`), else the mean."""
    logits = logits.float()
    reduction = "mean" if num_items is None else "sum"
    loss = problem_of(problem_type).loss(logits, labels, reduction)
    return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)


def uncertainty_loss(
    uncertainty: dict[int, Tensor],
    exit_logits: dict[int, Tensor],
    labels: Tensor,
    problem_type: str,
    num_items: Any = None,
) -> Tensor:
    """The loss of learning to exit: the mean over exits and rows of (u - t)^2, where t says how wrong the exit is: 1
    or 0, for regression |tanh(y' - y)|. Source: BERxiT, section 4.2 (with the complement, certainty, there). u [B] and
    logits [B, K] come by block number."""
    problem, losses = problem_of(problem_type), []
    counts = problem.has_label(labels)
    for m, predicted in uncertainty.items():
        wrong = problem.error(exit_logits[m].detach(), labels)
        squares = F.mse_loss(predicted.float(), wrong, reduction="none")
        losses.append((squares * counts).sum() / counts.sum().clamp(min=1))
    loss = torch.stack(losses).mean()
    if num_items is None:
        return loss
    return loss * (labels != NO_LABEL).sum() / torch.as_tensor(num_items, device=loss.device)


def check_weights(weights: Any) -> str | list[float]:
    """What `exit_weights` may be: `uniform`, `linear`, or numbers, which come back as a list of floats."""
    if isinstance(weights, str):
        check_choice("exit_weights", weights, ("uniform", "linear"))
        return weights
    listed = isinstance(weights, (list, tuple))
    require(listed, "exit_weights", weights, "it must be 'uniform', 'linear' or a list")
    positive = all(is_number(w) and w >= 0 for w in weights) and sum(weights) > 0
    require(positive, "exit_weights", weights, "a list must hold numbers >= 0, not all of them 0")
    return [float(w) for w in weights]


def loss_weights(weights: str | list[float], exits: list[int]) -> list[float]:
    """The weight of each exit's loss.

    `uniform`: 1 each, Eq. 8's plain sum. `linear`: m / sum of all m, as PABEE (exit 0 weighs as exit 1). A list: as
    given."""
    if weights == "uniform":
        return [1.0] * len(exits)
    if weights == "linear":
        depth = [max(m, 1) for m in exits]
        return [m / sum(depth) for m in depth]
    if len(weights) != len(exits):
        raise ValueError(
            f"exit_weights has {len(weights)} numbers, but there are {len(exits)} exits, at blocks {exits}."
        )
    return list(cast(list[float], weights))  # "uniform" and "linear" have returned
