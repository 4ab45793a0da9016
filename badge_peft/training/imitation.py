"""Global Past-Future's second loss: each exit's guesses of the states behind it should point their way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.tuner.notes import Notes
from badge_peft.tuner.run import ExitRun


class ImitationRun(ExitRun):
    """A pass that keeps the exits' states and guesses for `imitation_loss`."""

    keep_notes = True


def imitation_loss(notes: Notes) -> Tensor:
    """Mean over exits i of the mean over j > i of 1 - cos(guess_ij, v_j), v_j without gradient.

    Raises:
        ValueError: the exits make no guesses.
    """
    if not notes.guesses:
        raise ValueError("objective='past_future' needs BadgeConfig(exit_type='past_future', final_exit='exit').")
    per_exit: dict[int, list[Tensor]] = {}
    for (i, j), guess in notes.guesses.items():
        per_exit.setdefault(i, []).append(1 - F.cosine_similarity(guess, notes.vectors[j].detach(), dim=-1).mean())
    return torch.stack([torch.stack(losses).mean() for losses in per_exit.values()]).mean()
