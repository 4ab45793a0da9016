"""Exit policies by name: each is a class with one definition and two uses, live and `replay`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from badge_peft.early_exit.config import POLICIES, EarlyExitConfig, register_policy
from badge_peft.early_exit.policies.base import ExitPolicy
from badge_peft.early_exit.policies.threshold import ThresholdPolicy

# A class is registered when its module is read, and this is the order in which `policy="auto"` tries them.
# isort: off
from badge_peft.early_exit.policies.divergence import DivergencePolicy, PatiencePolicy
from badge_peft.early_exit.policies.confidence import ConfidentPatiencePolicy, EntropyPolicy, MaxProbPolicy
from badge_peft.early_exit.policies.agreement import AgreementPolicy, LearnedPolicy
from badge_peft.early_exit.policies.fixed import FixedDepthPolicy, NeverPolicy
from badge_peft.early_exit.policies.ranking import TopKPolicy
# isort: on


def policy_class(config: EarlyExitConfig) -> type[ExitPolicy]:
    """The class that a config names."""
    return POLICIES[config.policy]


def build_policy(config: EarlyExitConfig | dict[str, Any] | None = None, **overrides: Any) -> ExitPolicy:
    """The policy that a config describes.

    Args:
        config: `None` takes the defaults. It is never changed.
        **overrides: Fields of `EarlyExitConfig`, which win over `config`; another `policy` takes nothing over from it.

    Raises:
        ValueError: `config` is of another type, or a field has a value that is not allowed.
    """
    if overrides or not isinstance(config, EarlyExitConfig):
        given: Any = config
        try:  # a call with the same overrides as the one before takes no config apart
            config = _config_of(given, tuple((k, v, type(v)) for k, v in overrides.items()))  # 1 and True are equal
        except TypeError:  # a dict, or a list among the overrides
            config = EarlyExitConfig.of(config, **overrides)
    return policy_class(config)(config)


@lru_cache(maxsize=256)
def _config_of(config: EarlyExitConfig | None, overrides: tuple[tuple[str, Any, type], ...]) -> EarlyExitConfig:
    return EarlyExitConfig.of(config, **{name: value for name, value, _ in overrides})


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
    "TopKPolicy",
    "build_policy",
    "register_policy",
]
