"""Margins of `top_k`: what the candidates of each query need at each exit, and the settings worth trying.

An exit's score is full depth's score and an error, and a margin has to be as wide as the errors of its exit. So
margins are one factor times a shape that the data gives: how much the errors spread among the best candidates, or how
far the candidates of full depth's top k lie below the k-th best at each exit. One number is then chosen, whatever the
number of exits, so that few queries are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.ranking import kth_best

FACTORS = 60  # for each shape, spread over the queries that they keep
_NEEDS = (0.8, 0.95)  # quantiles over the queries, as shapes
_HAIR = 1 + 1e-5  # wider than what was needed, so that rounding loses nothing

Array = np.ndarray


def margin_settings(
    scores: Array, codes: Array, exits: list[int], asked: EarlyExitConfig, top_k: int
) -> Iterator[EarlyExitConfig]:
    """Configs with margins of each shape, times each factor, 0 among them, for scores [N, E], full depth last, of the
    queries `codes` [N]."""
    policy = build_policy(asked)
    decides = np.array([policy.can_exit(exits, j) and not policy.is_final(exits, j) for j in range(len(exits))])[:-1]
    need = needed_margins(scores, codes, top_k) * decides  # [Q, E - 1]
    if not decides.any():
        yield replace(asked, parameters={"margins": [0.0] * len(exits)})
        return
    for shape in _shapes(scores, codes, need, top_k):
        factors = (need / shape).max(axis=1)  # [Q], with which each query is surely kept
        spread = np.quantile(factors, np.linspace(0, 1, min(FACTORS, len(factors))), method="higher")
        for factor in np.unique(np.append(spread, 0.0)):
            yield replace(asked, parameters={"margins": [*(shape * factor * _HAIR).tolist(), 0.0]})


def needed_margins(scores: Array, codes: Array, top_k: int) -> Array:
    """[Q, E - 1]: how far below the k-th best of its query the lowest of full depth's top k lies, at each exit but the
    last: with margins as wide as this none of them leaves."""
    top = scores[:, -1] >= kth_best(scores[:, -1], codes, top_k)  # all of them, where there are at most k
    need = np.zeros((int(codes.max()) + 1, scores.shape[1] - 1))
    for j in range(scores.shape[1] - 1):
        below = kth_best(scores[:, j], codes, top_k) - scores[:, j]
        np.maximum.at(need[:, j], codes[top], below[top])
    return need


def _shapes(scores: Array, codes: Array, need: Array, top_k: int) -> list[Array]:
    """[E - 1] each, above 0: margins up to a factor."""
    near = scores[:, -1] >= kth_best(scores[:, -1], codes, 2 * top_k)
    errors, owners = (scores[:, :-1] - scores[:, -1:])[near], codes[near]
    counts = np.maximum(np.bincount(owners, minlength=len(need)), 1)
    means = np.stack([np.bincount(owners, column, len(need)) / counts for column in errors.T], axis=1)  # [Q, E - 1]
    spread = (errors - means[owners]).std(axis=0)  # an error that all candidates share changes no ranking
    found = [spread, *(np.quantile(need, q, axis=0) for q in _NEEDS)]
    return [np.maximum(shape, max(1e-3 * shape.max(), 1e-9)) for shape in found]
