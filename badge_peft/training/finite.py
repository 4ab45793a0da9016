"""Stops a training that has run into numbers that are not finite: it cannot recover, and its exits say nothing."""

from __future__ import annotations

from torch import Tensor, nn

_REMEDY = "Train with a smaller learning rate or in float32, and look for rows of unusual length or values."


class TrainingStopped(ValueError):
    """A training has run into numbers that are not finite."""


def check_loss(loss: Tensor, step: int) -> None:
    """Refuses a loss that is not finite. Trainer would count it as zero, and go on."""
    if not loss.isfinite():
        raise TrainingStopped(f"training stopped: the loss of step {step} is {loss.item()}. {_REMEDY}")


def check_parameters(model: nn.Module, step: int) -> None:
    """Refuses a trained model with weights that are not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise TrainingStopped(f"training stopped: after step {step}, {name} is not finite. {_REMEDY}")
