"""Policies and configs in words: names, the reason for an exit, the fields worth a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.evidence import Evidence, capitalized
from badge_peft.early_exit.registry import POLICIES

_DEFAULT = {name: field.default for name, field in EarlyExitConfig.__dataclass_fields__.items()}

_IN_A_LINE = (
    "top_k",
    "threshold",
    "patience",
    "depth",
    "min_exit",
    "max_exit",
    "exit_layers",
    "decide_every",
    "temperature",
)


class PolicyText:
    """The part of `ExitPolicy` that says in words what it is and why a row stopped."""

    name: ClassVar[str]
    #: The fields with a default other than None or False that this policy reads; all policies read the others.
    own_fields: ClassVar[tuple[str, ...]] = ()
    #: Whether several exits have to agree: as many as the field `patience` says.
    counts_exits: ClassVar[bool] = False
    config: EarlyExitConfig
    max_exit: Any
    is_final: Callable[[Sequence[int], int], bool]
    can_exit: Callable[[Sequence[int], int], bool]

    @classmethod
    def title(cls, config: EarlyExitConfig) -> str:
        """The policy and its form: `divergence (kl)`."""
        return cls.name

    @classmethod
    def label(cls, config: EarlyExitConfig) -> str:
        """A short name of the variant, for curves and tables: `divergence-kl-consecutive t=2`."""
        own = [getattr(config, name) for name in cls.own_fields if getattr(config, name) != _DEFAULT[name]]
        form = "-".join([cls.name, *own])
        return f"{form} t={config.patience}" if cls.counts_exits and config.patience is not None else form

    @classmethod
    def fitted_numbers(cls, config: EarlyExitConfig) -> str:
        """What of `parameters` tells settings apart, for a line; empty where the other fields do."""
        return ""

    def evidence(self, history: ExitHistory, j: int) -> Evidence | None:
        """What the policy saw of the one row in `history` at exit j (index); None where it compares no number."""
        return None

    def why(self, exits: Sequence[int], j: int, evidence: Evidence | None) -> str:
        """What decides about a row at exit j (index): `cnt = 1 ≥ t = 1`."""
        config, block = self.config, exits[j]
        if self.is_final(exits, j):
            last = j == len(exits) - 1
            return "the last exit always answers" if last else f"no row goes past block {self.max_exit} (max_exit)"
        if not self.can_exit(exits, j):
            if config.min_exit is not None and block < config.min_exit:
                return f"no row stops before block {config.min_exit} (min_exit)"
            if config.exit_layers is not None and block not in config.exit_layers:
                return f"the policy decides at blocks {short(config.exit_layers)} only (exit_layers)"
            return f"the rule decides at each k-th exit only, k = {config.decide_every} (decide_every)"
        return f"policy {self.name!r} has decided" if evidence is None else evidence.comparison

    def sentence(self, exits: Sequence[int], j: int, evidence: Evidence | None, problem_type: str) -> str:
        """Why a row got its answer at exit j (index)."""
        why = self.why(exits, j, evidence)
        return f"No exit before it met the rule, and {why}." if j == len(exits) - 1 else capitalized(why)


def describe(config: EarlyExitConfig) -> str:
    """The policy and what is set: `divergence (ce), threshold=0.2, patience=1`."""
    shown = [f"{name}={short(value)}" for name, value in _set(config).items()]
    kind = POLICIES[config.policy]
    return ", ".join(filter(None, [kind.title(config), *shown, kind.fitted_numbers(config)]))


def short(value: float | list[float] | list[int]) -> str:
    """Four digits, also of each number of a list."""
    if isinstance(value, list):
        return f"[{', '.join(map(short, value))}]"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def policy_label(config: EarlyExitConfig) -> str:
    """A short name of a policy's variant, for curves and tables: `divergence-kl-consecutive t=2`."""
    return POLICIES[config.policy].label(config)


def set_fields(config: EarlyExitConfig) -> dict[str, Any]:
    """The fields that say how a config stops, of those that its policy reads; open ones are left out."""
    own = ("policy", *POLICIES[config.policy].own_fields)
    return {name: getattr(config, name) for name in own} | _set(config)


def _set(config: EarlyExitConfig) -> dict[str, Any]:
    return {name: value for name in _IN_A_LINE if (value := getattr(config, name)) != _DEFAULT[name]}
