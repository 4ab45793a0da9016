"""`Schedule`: what a policy says of each exit whatever the logits are. It is asked at every block of every call, and
the same each time, so it is worked out once for a config."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.base import ExitPolicy


class Schedule(NamedTuple):
    """Of a policy and E exits.

    Args:
        needed: [E], `ExitPolicy.needs_logits`.
        able: [E], `ExitPolicy.can_exit`.
        final: [E], `ExitPolicy.is_final`.
    """

    needed: tuple[bool, ...]
    able: tuple[bool, ...]
    final: tuple[bool, ...]

    @property
    def end(self) -> int:
        """The first exit (index) at which every row stops."""
        return self.final.index(True)

    @property
    def decides(self) -> bool:
        """Whether logits decide at any exit."""
        return any(self.able[: self.end])


def schedule_of(policy: ExitPolicy, exits: Sequence[int]) -> Schedule:
    """The schedule of a policy for a model with these exits, by block number."""
    if policy.config.parameters is not None:  # whatever was fitted may take longer to compare
        return _work_out(policy, tuple(exits))
    return _known(type(policy), policy.config, tuple(exits))  # type: ignore[arg-type]  # mypy: a class has no hash


@lru_cache(maxsize=1024)
def _known(kind: type[ExitPolicy], config: EarlyExitConfig, exits: tuple[int, ...]) -> Schedule:
    return _work_out(kind(config), exits)


def _work_out(policy: ExitPolicy, exits: tuple[int, ...]) -> Schedule:
    places = range(len(exits))
    return Schedule(
        tuple(policy.needs_logits(exits, j) for j in places),
        tuple(policy.can_exit(exits, j) for j in places),
        tuple(policy.is_final(exits, j) for j in places),
    )
