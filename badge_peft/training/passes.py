"""Passes of objectives: gradient equilibrium rescales the gradients on their way down, Global Past-Future adds a loss
by which each exit's predictions of deeper states point their way."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.tuner.context import Frame, get_hidden_states, with_states
from badge_peft.tuner.exits import ExitState


class _Scale(torch.autograd.Function):
    """Identity forward, a factor backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return _Scale.apply(x, factor)


class GradientEquilibriumPass(EarlyExitPass):
    """What reaches block m is the mean of the gradients of the exits at m and deeper, for any set of exits.

    With n_m exits at blocks >= m, the weight of their gradients inside of block m is c_m = 1 / n_m. So what exit m
    reads of block m is scaled by c_m, what it reads of the block's input by c_{m-1}, and between blocks m-1 and m the
    gradient changes from c_m to c_{m-1}. The exits' own parameters are not rescaled.
    """

    def weight(self, number: int) -> float:
        """c_m, for the embeddings c_0."""
        (reader,) = self.readers
        return 1 / sum(m >= number for m in reader.exits.numbers)

    def before_block(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gradients that leave block `number` downwards have weight c_m and go on with c_{m-1}."""
        hidden = scale_gradient(get_hidden_states(args, kwargs), self.weight(number - 1) / self.weight(number))
        return with_states(hidden, args, kwargs)

    def before_exit(self, number: int, block_input: Tensor, frame: Frame) -> Frame:
        """The exit's gradients enter block m with c_m, and what is before it with c_{m-1}."""
        scaled = Frame(scale_gradient(block_input, self.weight(number - 1) if number else self.weight(0)))
        inside = self.weight(number)
        for name in ("attention_sum", "attention", "ffn_sum", "output"):
            value = getattr(frame, name)
            if value is not None:
                setattr(scaled, name, scale_gradient(value, inside))
        scaled.scale_weights = partial(scale_gradient, factor=inside)
        return scaled


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
