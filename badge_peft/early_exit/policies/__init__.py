"""Exit policies by name: each is a class with one definition and two uses, live and `replay`."""

from __future__ import annotations

from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.agreement import AgreementPolicy
from badge_peft.early_exit.policies.base import ExitPolicy
from badge_peft.early_exit.policies.confidence import (
    ConfidentPatiencePolicy,
    EntropyPolicy,
    LearnedPolicy,
    MaxProbPolicy,
)
from badge_peft.early_exit.policies.divergence import DivergencePolicy, PatiencePolicy
from badge_peft.early_exit.policies.fixed import FixedDepthPolicy, NeverPolicy
from badge_peft.early_exit.policies.threshold import ThresholdPolicy

POLICIES: dict[str, type[ExitPolicy]] = {
    policy.name: policy
    for policy in (
        DivergencePolicy,
        PatiencePolicy,
        EntropyPolicy,
        MaxProbPolicy,
        LearnedPolicy,
        ConfidentPatiencePolicy,
        AgreementPolicy,
        FixedDepthPolicy,
        NeverPolicy,
    )
}


def build_policy(config: EarlyExitConfig | dict[str, Any] | None = None, **overrides: Any) -> ExitPolicy:
    """The policy that a config describes."""
    config = EarlyExitConfig.of(config, **overrides)
    return POLICIES[config.policy](config)


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
]
