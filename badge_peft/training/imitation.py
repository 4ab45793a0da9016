"""Global Past-Future's second loss: each exit's predictions of deeper states should point their way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.tuner.exits import ExitState

NEEDS = "objective='past_future' needs BadgeConfig(exit_type='past_future', final_exit='exit')."


class ImitationPass(EarlyExitPass):
    """A full-depth pass whose output has `imitation_loss`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for reader in self.readers:
            reader.state.keeps_vectors = True

    def training_outputs(self) -> dict[str, Tensor]:
        """`imitation_loss` [B]."""
        (reader,) = self.readers
        return {"imitation_loss": imitation_loss(reader.state)}


def imitation_loss(state: ExitState) -> Tensor:
    """[B]: mean over exits i of the mean over j > i of 1 - cos(prediction_ij, v_j), v_j without gradient."""
    if not state.predictions:
        raise ValueError(NEEDS)
    per_exit: dict[int, list[Tensor]] = {}
    for (i, j), prediction in state.predictions.items():
        per_exit.setdefault(i, []).append(1 - F.cosine_similarity(prediction, state.vectors[j].detach(), dim=-1))
    return torch.stack([torch.stack(losses).mean(dim=0) for losses in per_exit.values()]).mean(dim=0)
