"""Stopping early: the exit policies, their config, and the pass that obeys them."""

from __future__ import annotations

from typing import Any

from badge_peft.early_exit import policies  # noqa: F401 - reading it makes their names known to the config
from badge_peft.early_exit.config import EarlyExitConfig

__all__ = ["EarlyExitConfig", "early_exit_forward"]


def __getattr__(name: str) -> Any:
    # the config is a field of BadgeConfig, and so read before the tuner that the pass needs
    if name == "early_exit_forward":
        from badge_peft.early_exit.mixin import early_exit_forward

        return early_exit_forward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
