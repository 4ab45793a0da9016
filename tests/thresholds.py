"""Thresholds that rounding cannot move a row across: in the middle of a gap between the signals that a policy really
has on some logits. With one of these, exits of a full-depth pass and of a compacted one can be compared exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import build_policy


def in_a_gap(
    policy: dict[str, Any],
    exit_logits: Tensor,
    exits: list[int],
    problem_type: str = "single_label_classification",
    uncertainty: Tensor | None = None,
    least: float = 1e-4,
) -> dict[str, Any]:
    """`policy` with the threshold that spreads the rows of these logits [N, E, K] over the most exits, among those in
    a gap wider than `least`."""
    history = ExitHistory.of(
        exit_logits.float().numpy(), exits, problem_type, None if uncertainty is None else uncertainty.float().numpy()
    )
    rule: Any = build_policy(policy)
    values = np.concatenate([rule.score(history, j) for j in range(len(exits) - 1)])
    values = np.unique(values[np.isfinite(values)])
    found = []
    for low, high in zip(values, values[1:], strict=False):
        if high - low > least:
            config = {**policy, "threshold": (float(low) + float(high)) / 2}
            spread = len(set(build_policy(config).replay_history(history).tolist()))
            found.append((spread, high - low, config))
    best = max(found, key=lambda x: x[:2])
    assert best[0] >= 2, "choose another seed: every threshold stops all rows at one exit"
    return best[2]
