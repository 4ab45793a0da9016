"""Exit policies by name: each is a class with one definition and two uses, live and `replay`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.base import ExitPolicy
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.early_exit.registry import POLICIES, register_policy

# A class is registered when its module is read, and this is the order in which `policy="auto"` tries them.
# isort: off
from badge_peft.early_exit.policies.divergence import DivergencePolicy, PatiencePolicy
from badge_peft.early_exit.policies.confidence import ConfidentPatiencePolicy, EntropyPolicy, MaxProbPolicy
from badge_peft.early_exit.policies.agreement import AgreementPolicy
from badge_peft.early_exit.policies.learned import LearnedPolicy
from badge_peft.early_exit.policies.fixed import FixedDepthPolicy, NeverPolicy
# isort: on


def policy_class(config: EarlyExitConfig) -> type[ExitPolicy]:
    """The class that a config names."""
    return POLICIES[config.policy]


def build_policy(config: EarlyExitConfig | dict[str, Any] | None = None, **overrides: Any) -> ExitPolicy:
    """The policy that a config describes. One that was built of late is found again: a service may ask at each call.

    Args:
        config: `None` takes the defaults. It is never changed.
        **overrides: Fields of `EarlyExitConfig`, which win over `config`.

    Raises:
        ValueError: `config` is of another type, or a field has a value that is not allowed.
    """
    if isinstance(config, dict):
        overrides = {**config, **overrides}
        config = None
    try:
        known = _recent(config, **overrides)
    except TypeError:  # a list or a dict among the fields, by which nothing can be found again
        return _build(config, **overrides)
    # a class that was defined again has taken the place of the one that was built
    return known if type(known) is POLICIES[known.name] else _build(config, **overrides)


def _build(config: EarlyExitConfig | None, /, **overrides: Any) -> ExitPolicy:
    config = EarlyExitConfig.of(config, **overrides)
    return policy_class(config)(config)


_recent = lru_cache(maxsize=16, typed=True)(_build)  # typed: `True` is 1, but no patience


__all__ = [
    "POLICIES",
    "AgreementPolicy",
    "ConfidentPatiencePolicy",
    "DivergencePolicy",
    "EntropyPolicy",
    "ExitPolicy",
    "FixedDepthPolicy",
    "LearnedPolicy",
    "MaxProbPolicy",
    "NeverPolicy",
    "PatiencePolicy",
    "ThresholdPolicy",
    "build_policy",
    "register_policy",
]
