"""Exits that build on the one before them: what exit m adds to its own logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from badge_peft.tuner.exit_state import ExitState
from badge_peft.tuner.exits import AdapterExits, Exit


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


def build_on(exits: AdapterExits, exit_: Exit, logits: Tensor, state: ExitState) -> Tensor:
    """What exit m answers, [B, K], given its own `logits`: z_m + c_m z_{m-1}, which is what exit m + 1 sees of it."""
    if exits.carry is None:
        return logits
    if exit_.carry is not None:
        logits = exit_.carry(logits, state.from_before("logits", logits))
    state.left["logits"] = logits.detach()
    return logits
