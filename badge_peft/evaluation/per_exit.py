"""A threshold for each exit: what is right on average costs least where every exit has its own.

For a price of a block, the cost of a row is its error at the exit that answers and what the blocks before it cost.
Starting from one threshold for all exits, that of each exit in turn is set to the cut of its scores with the least
cost of the rows that come to it, all other thresholds being as they are (coordinate descent); so the cost never rises.
Several prices give settings from slow to fast. What they are worth is measured on rows that did not choose them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import ThresholdPolicy, build_policy
from badge_peft.evaluation.candidates import decided_scores
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.utils.problem import problem_of

Array = np.ndarray
PRICES = np.geomspace(0.003, 1.0, 10)  # of all blocks, in wrong rows
SWEEPS = 4


def per_exit(starts: Sequence[EarlyExitConfig], exit_logits: ExitLogits) -> list[EarlyExitConfig]:
    """Configs with a threshold for each exit, of the families of those of `starts` that have one for all exits and
    decide at an exit whatever the thresholds of others are."""
    families: dict[EarlyExitConfig, list[float]] = {}
    for config in starts:
        if isinstance(config.threshold, float):
            families.setdefault(replace(config, threshold=None), []).append(config.threshold)
    found: dict[EarlyExitConfig, None] = {}
    for family, thresholds in families.items():
        policy = cast(ThresholdPolicy, build_policy(family))
        if policy.uses_threshold(exit_logits.kind) and policy.decides_alone:
            found |= dict.fromkeys(_settings(policy, thresholds, exit_logits))
    return list(found)


def _settings(policy: ThresholdPolicy, thresholds: list[float], exit_logits: ExitLogits) -> list[EarlyExitConfig]:
    history, exits = exit_logits.history(), exit_logits.exits
    last = next(j for j in range(len(exits)) if policy.is_final(exits, j))
    if last == 0:
        return []
    assert exit_logits.labels is not None
    error = problem_of(exit_logits.kind).error
    wrong = np.stack(
        [error(exit_logits.logits[:, j], exit_logits.labels).numpy() for j in range(last + 1)]
    )  # [L+1, N]
    depth = np.array(exits[: last + 1], dtype=np.float64)[:, None] / exit_logits.depth
    scores = decided_scores(policy, history)[:last]  # [L, N], small where a row may stop
    to_config = -1.0 if policy.stops_above else 1.0
    order = scores.argsort(axis=1)
    found = []
    for price in PRICES:
        costs = wrong + price * depth
        starts = [np.full(last, tau / to_config) for tau in thresholds]
        start = min(starts, key=lambda taus: cost(scores, costs, taus))
        taus = descend(scores, costs, start, order) * to_config
        whole = [*taus, *[taus[-1]] * (len(exits) - last)]  # exits that are never asked have one, too
        found.append(replace(policy.config, threshold=[float(f"{tau:.7g}") for tau in whole]))
    return found


def cost(scores: Array, costs: Array, taus: Array) -> float:
    """The mean cost where a row stops at the first exit whose score [L, N] lies below its threshold [L], else at the
    last; `costs` [L + 1, N] are those of a row that stops at an exit."""
    return float(_onward(scores, costs, taus, -1).mean())


def descend(scores: Array, costs: Array, taus: Array, order: Array | None = None) -> Array:
    """The thresholds [L] from which no change of a single one lowers the cost, as far as `SWEEPS` rounds find them;
    arguments as for `cost`, and the rows of each exit by their scores."""
    taus, order = taus.copy(), scores.argsort(axis=1) if order is None else order
    for _ in range(SWEEPS):
        before = taus.copy()
        comes = np.ones(scores.shape[1], dtype=bool)
        for j in range(len(scores)):
            rows = order[j][comes[order[j]]]
            gains = costs[j] - _onward(scores, costs, taus, j)
            taus[j] = _cut(scores[j][rows].astype(np.float64), gains[rows], taus[j])
            comes &= scores[j] >= taus[j]
        if np.array_equal(before, taus):
            break
    return taus


def _onward(scores: Array, costs: Array, taus: Array, j: int) -> Array:
    """[N]: the cost of each row that goes past exit j."""
    found = costs[-1]
    for k in range(len(scores) - 1, j, -1):
        found = np.where(scores[k] < taus[k], costs[k], found)
    return found


def _cut(scores: Array, gains: Array, before: float) -> float:
    """The threshold below which the sum of `gains`, what stopping costs more than going on, is least; of equal ones
    that of the fewest rows. `scores` increase. Where nothing is better, it stays as it was `before`."""
    count = int(np.isfinite(scores).sum())
    if not count:
        return before
    total = np.concatenate([[0.0], np.cumsum(gains[:count])])
    places = np.flatnonzero(np.append(True, scores[1:count] > scores[: count - 1]))  # between two different scores
    places = np.append(places, count)
    best = int(places[total[places].argmin()])
    now = int(np.searchsorted(scores[:count], before))
    if total[now] <= total[best]:
        return before
    aside = 2e-3 * (1 + abs(scores[[0, count - 1]]))  # beyond the first or the last score
    below = scores[best - 1] if best > 0 else scores[0] - aside[0]
    above = scores[best] if best < count else scores[count - 1] + aside[1]
    return float(below + above) / 2
