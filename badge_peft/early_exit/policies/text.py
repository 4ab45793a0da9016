"""A config in words: a line, a curve's name, the fields worth a table."""

from __future__ import annotations

from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.registry import POLICIES

_IN_A_LINE = ("threshold", "patience", "depth", "min_exit", "max_exit")
_IN_A_TABLE = ("policy", "divergence", "threshold", "patience", "window", "min_exit", "max_exit", "depth", "normalize")


def describe(config: EarlyExitConfig) -> str:
    """The policy and what is set: `divergence (ce), threshold=0.2, patience=1`."""
    shown = [f"{name}={getattr(config, name):.4g}" for name in _IN_A_LINE if getattr(config, name) is not None]
    if config.decide_every > 1:
        shown.append(f"decide_every={config.decide_every}")
    return ", ".join([POLICIES[config.policy].title(config), *shown])


def policy_label(config: EarlyExitConfig) -> str:
    """A short name of a policy's variant, for curves and tables: `divergence-kl-consecutive t=2`."""
    return POLICIES[config.policy].label(config)


def set_fields(config: EarlyExitConfig) -> dict[str, Any]:
    """The fields that say how a config stops, of those that its policy reads; open ones are left out."""
    unset = {name: field.default for name, field in EarlyExitConfig.__dataclass_fields__.items()}
    own = ("policy", *POLICIES[config.policy].own_fields)
    shown = [name for name in _IN_A_TABLE if name in own or unset[name] in (None, False)]
    return {name: value for name in shown if (value := getattr(config, name)) not in (None, False)}
