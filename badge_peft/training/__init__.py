"""Training multi-exit models with transformers' Trainer."""

from __future__ import annotations

from badge_peft.training.parameters import make_optimizer, parameter_groups

__all__ = ["make_optimizer", "parameter_groups"]
