"""Exits that build on the one before them: what exit m adds to its own logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badge_peft.tuner.exit_state import ExitState, finite
from badge_peft.tuner.exits import AdapterExits, Exit
from badge_peft.tuner.pooling import Pooling

CARRIES = ("logits", "states")


class CarriedLogits(nn.Module):
    """z_m + c_m z_{m-1}: the logits of the exit before, times one learned number.

    c_m starts at 0, so that the exit starts as one that stands alone. z_{m-1} takes no gradient: each exit corrects
    the one before it, as in boosting, and trains it for nobody else. Source: the cascade connections of Wolczyk et
    al., "Zero Time Waste: Recycling Predictions in Early Exit Neural Networks", NeurIPS 2021, which concatenate the
    logits in place of adding them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # c_m

    def forward(self, logits: Tensor, before: Tensor) -> Tensor:
        """Both [B, K], the result too."""
        return logits + self.weight.to(logits.dtype) * before


class CarriedStates(nn.Module):
    """z_m + V_m sum_{j < m} s_j: what the bottlenecks of the bypasses before have found, pooled as the exit pools.

    V_m starts at 0, so that the exit starts as one that stands alone. The states take gradients: a bypass learns what
    helps its own exit and all deeper ones.

    Args:
        r: Width of a bottleneck.
        num_labels: K.
    """

    def __init__(self, r: int, num_labels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_labels, r))  # V_m

    def forward(self, logits: Tensor, before: Tensor) -> Tensor:
        """[B, K], and the sum of the states [B, r] -> [B, K]."""
        return logits + F.linear(before.to(self.weight.dtype), self.weight).to(logits.dtype)


def build_on(exits: AdapterExits, exit_: Exit, logits: Tensor, state: ExitState, pooling: Pooling) -> Tensor:
    """What exit m answers, [B, K], given its own `logits`; leaves for the deeper ones what they need."""
    if exits.carry == "logits":
        return _carry_logits(exit_, logits, state)
    if exits.carry == "states":
        return _carry_states(exit_, logits, state, pooling, exits.ladder)
    return logits


def _carry_logits(exit_: Exit, logits: Tensor, state: ExitState) -> Tensor:
    """z_m + c_m z_{m-1}, which is what exit m + 1 sees of it."""
    if exit_.carry is not None:
        logits = exit_.carry(logits, state.from_before("logits", logits))
    state.left["logits"] = logits.detach()
    return logits


def carry_together(
    adapters: Sequence[AdapterExits], exits: Sequence[Exit], states: Sequence[ExitState], logits: Tensor
) -> Tensor:
    """What exit m of T adapters answers, [T, n, K]: as `build_on`, in a few operations for all that carry logits.

    Args:
        adapters: All exits of each.
        exits: Exit m of each.
        states: Of each adapter's call.
        logits: Of the exits by themselves, [T, n, K]; K is the most labels of any.
    """
    building = [i for i, exit_ in enumerate(exits) if exit_.carry is not None]
    if building:
        width = logits.shape[-1]
        before = [F.pad(states[i].left["logits"], (0, width - adapters[i].num_labels)) for i in building]
        numbers = torch.stack([cast(CarriedLogits, exits[i].carry).weight for i in building])
        added = numbers.to(logits.dtype).unsqueeze(-1) * finite(torch.stack(before).to(logits))
        whole = len(building) == len(exits)
        logits = logits + added if whole else logits.index_add(0, torch.tensor(building, device=logits.device), added)
    for i, own in enumerate(adapters):
        if own.carry is not None:
            states[i].left["logits"] = logits[i, :, : own.num_labels].detach()
    return logits


def _carry_states(exit_: Exit, logits: Tensor, state: ExitState, pooling: Pooling, ladder: bool) -> Tensor:
    """z_m + V_m sum_{j < m} s_j. An exit without a bypass, on the embeddings, has nothing to add to the sum."""
    if exit_.carry is not None:
        # in its own precision: the weights of a model that is offloaded are there inside of the module's call alone
        before = state.from_before("states", state.left["states"].to(logits.device))
        logits = exit_.carry(logits, before)
    # [B, r], or [B, S, r] where all positions have one; a ladder goes on from there
    own = state.left.get("bottleneck") if ladder else state.left.pop("bottleneck", None)
    if own is not None:
        pooled = pooling.reduce(pooling.pick(own)) if own.dim() > 2 else own
        state.add("states", pooled, pooled)
    return logits
