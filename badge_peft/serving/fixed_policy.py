"""`FixedPolicy`: what a call may move of the policy in an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.export.folder import LARGEST_PATIENCE

_FAR = 1e30  # beyond every score, in float32 and times ln K, too
_MOVED = ("threshold", "patience", "calibration")


@dataclass(frozen=True)
class FixedPolicy:
    """The policy in a file, of which a call moves the threshold and the patience; `thresholds` is how many the file
    takes, 0 for one number."""

    config: EarlyExitConfig
    num_labels: int
    problem_type: str
    num_blocks: int
    thresholds: int

    @classmethod
    def of(cls, facts: Mapping[str, Any], num_blocks: int) -> FixedPolicy:
        """From what `early_exit.json` says of a task."""
        config, tau = EarlyExitConfig.of(facts["early_exit"]), facts["threshold"]
        return cls(
            config, facts["num_labels"], facts["problem_type"], num_blocks, len(tau) if isinstance(tau, list) else 0
        )

    def inputs(self, config: EarlyExitConfig) -> tuple[Any, int | None]:
        """Threshold and patience of a call at `config`, None where the policy does not read it; a ValueError where the
        file cannot answer at this setting."""
        own = build_policy(self.config)
        compares = own.uses_threshold(self.problem_type)
        if config.policy == "never" and self.config.policy != "never":
            return self._full_depth(own, compares)
        names = [f.name for f in fields(config) if f.name not in _MOVED]
        other = [name for name in names if getattr(config, name) != getattr(self.config, name)]
        if other:
            raise ValueError(
                f"{other[0]}={getattr(config, other[0])!r} is not allowed: it is fixed in the file as "
                f"{getattr(self.config, other[0])!r}, and a call changes threshold and patience (or goes to full "
                "depth, policy='never'). Export the adapter with the other policy, or serve it without --onnx."
            )
        wanted = build_policy(config).resolve(self.num_labels, self.problem_type)
        given = len(wanted.threshold) if isinstance(wanted.threshold, list) else 0
        if compares and given not in (0, self.thresholds):
            number = f"{self.thresholds}, one for each exit" if self.thresholds else "one number"
            raise ValueError(f"threshold={wanted.threshold} is not allowed: the file takes {number}.")
        return wanted.threshold if compares else None, wanted.patience if own.counts_exits else None

    def _full_depth(self, own: Any, compares: bool) -> tuple[Any, int | None]:
        """Numbers by which no row stops before the last block."""
        capped = own.max_exit is not None and own.max_exit < self.num_blocks
        if capped or own.by_group or not (own.counts_exits or compares):
            raise ValueError(
                f"policy='never' is not allowed: the file, of policy={self.config.policy!r}, cannot be sent to full "
                "depth. Export the adapter with another policy, or serve it without --onnx."
            )
        if own.counts_exits:
            return None, LARGEST_PATIENCE
        return _FAR if own.stops_above else -_FAR, None
