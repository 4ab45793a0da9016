"""LTE, learning to exit: a trained layer says how far an exit is to be trusted."""

from __future__ import annotations

from typing import cast

import numpy as np

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array
from badge_peft.early_exit.policies.evidence import Evidence, Quantity
from badge_peft.early_exit.policies.nodes import ExitNodes, Value
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.early_exit.registry import register_policy


@register_policy
class LearnedPolicy(ThresholdPolicy):
    """LTE, learning to exit: stop where the uncertainty that a small trained layer predicts is below the threshold.

    The layer is a linear map with a sigmoid, shared by all exits. `BadgeConfig(learn_to_exit=True)` adds it, and it is
    trained to predict whether the exit is wrong (regression: how far off it is). Source: Xin et al., "BERxiT", 2021.
    Default threshold: 0.1.
    """

    name = "learned"
    reads_uncertainty = True

    def lookback(self) -> int:
        """No exit."""
        return 0

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: predicted uncertainty in [0, 1]."""
        found = history.uncertainty
        self.check_learned(found is not None and not np.isnan(found[j]).any())
        return cast(Array, found)[j]

    def score_nodes(self, at: ExitNodes) -> Value:
        """[n]: predicted uncertainty."""
        return at.uncertainty

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.1

    def quantity(self, problem_type: str) -> Quantity:
        return Quantity("predicted uncertainty", "u")

    def evidence(self, history: ExitHistory, j: int) -> Evidence | None:
        """None at an exit that always answers: no layer was trained for the model's own head."""
        return None if self.is_final(history.exits, j) else super().evidence(history, j)
