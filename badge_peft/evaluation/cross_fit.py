"""What a search really gives: each setting is chosen on some of the rows and scored on the others.

A search takes the luckiest of thousands of settings, so its score on the rows that chose it is too high. Here every
fold of the rows is answered by the settings that the other folds choose, one for each speed-up, and a speed-up is
taken where the drop on these rows lies below the allowed one at a stated level. A faster setting is taken to
cost at least as much as a slower one, which lets neighboring speed-ups share their rows' noise.

Sources: Breiman and Spector, "Submodel Selection and Evaluation in Regression: the X-Random Case", 1992 (selection
inside of cross-validation); Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentiles);
Angelopoulos et al., "Conformal Risk Control", 2022 (the row more).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric, exit_scores, is_ratio, ratio_parts, scorer
from badge_peft.evaluation.tradeoff import TradeOffPoint, search
from badge_peft.utils.problem import problem_of

FOLDS = 5
SETTINGS = 20  # per variant of a policy; fewer than for the choice, as every fold searches
RESAMPLES = 200
SPEEDUPS = 40  # steps between full depth and no block at all
#: Probability with which a drop lies below its bound. It is counted from the exit that looks best on these rows, which
#: is better than the exit is, so that drops lie below it more often: docs/results/promises.md.
LEVEL = 0.65

Array = np.ndarray


@dataclass(frozen=True)
class HeldOut:
    """One speed-up, on rows that did not choose its settings.

    Args:
        goal: The layer speed-up that was asked of the settings.
        layer_speedup: What they reach on these rows.
        drop: Score of the reference less their score.
        low: Lower end of the drop's interval.
        high: Upper end of the drop's interval.
        bound: What the drop lies below with a probability of about `LEVEL`.
    """

    goal: float
    layer_speedup: float
    drop: float
    low: float
    high: float
    bound: float


def cross_fit(
    exit_logits: ExitLogits,
    policy: Any,
    metric: Metric,
    reference: str,
    goals: Sequence[float] | None = None,
    seed: int = 0,
    per_exit: bool = False,
) -> list[HeldOut]:
    """Speed-ups, slow to fast, with the drop that each costs on rows that did not choose the settings.

    Args:
        exit_logits: With labels.
        policy: As for `search`.
        metric: As for `exit_scores`.
        reference: What a drop is counted from: the `last` exit, or the `best` on all of these rows.
        goals: Layer speed-ups, increasing; None spreads `SPEEDUPS` of them.
        seed: Of the division into folds and of the bootstrap.
        per_exit: As for `search`.

    Returns:
        One entry for each goal that every fold reaches; none where there are fewer than two rows. Of token
        classification the folds are made of texts.
    """
    units = exit_logits.units
    if len(units) < 2:
        return []
    rows = np.random.default_rng(seed).permutation(len(units))
    speedups: Array = np.linspace(0, 1, SPEEDUPS, endpoint=False) if goals is None else np.array(goals)
    stops = np.full((len(speedups), len(exit_logits)), -1, dtype=np.int64)
    for fold in np.array_split(rows, min(FOLDS, len(rows))):
        held = units.rows_of(fold)
        chosen_on = exit_logits.select(torch.from_numpy(units.rows_of(np.setdiff1d(rows, fold))))
        tested = exit_logits.select(torch.from_numpy(held)).history()
        points = search(chosen_on, policy, SETTINGS, metric, per_exit)
        fastest = max(p.layer_speedup for p in points)
        best = None
        for g in np.flatnonzero(speedups <= fastest + 1e-12):
            best, before = best_at(points, speedups[g]), best
            same = before is not None and best.config is before.config
            stops[g, held] = stops[g - 1, held] if same else build_policy(best.config).replay_history(tested)
    reached = (stops >= 0).all(axis=1)
    if not reached.any():
        return []
    # one exit for all folds: the best that a fold finds is on average a worse one, from which little seems to be lost
    full = exit_scores(exit_logits, metric).best_exit if reference == "best" else exit_logits.exits[-1]
    drops, resampled = _drops(exit_logits, full, stops[reached], metric, seed)
    smooth = np.stack([isotonic_regression(sample).x for sample in resampled.T], axis=1)
    low, high, bound = np.quantile(smooth, [0.05, 0.95, LEVEL], axis=1)
    if problem_of(exit_logits.kind).gives_labels:
        n = len(units)
        bound = (n * bound + 1) / (n + 1)  # as if one row more were lost: where none was, a bootstrap sees no risk
    saved = 1 - units.largest(stops[reached]).mean(axis=1) / exit_logits.depth
    numbers = np.stack([speedups[reached], saved, drops, low, high, bound])
    return [HeldOut(*row) for row in numbers.T.tolist()]


def _drops(exit_logits: ExitLogits, exit_: int, stops: Array, metric: Metric, seed: int) -> tuple[Array, Array]:
    """For each of `stops` [S, N] the drop of the score [S] below that of `exit_`, and the same on resampled rows
    [S, RESAMPLES], paired."""
    full = np.full(len(exit_logits), exit_, dtype=np.int64)
    stops, places = np.unique(stops, axis=0, return_inverse=True)
    places = places.reshape(-1)
    reference, *answers = [exit_logits.predicted(s) for s in (full, *stops)]
    draw, n = np.random.default_rng(seed), len(exit_logits.units)
    if is_ratio(metric):  # of sums: no need to make the samples
        parts = [ratio_parts(exit_logits, a, metric) for a in (reference, *answers)]
        above, below = (np.stack(part) for part in zip(*parts, strict=True))  # [1 + S, U]
        counts = draw.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).T  # how often each unit is in a sample
        sampled = (above @ counts) / np.maximum(below @ counts, 1)
        scores = above.sum(axis=1) / np.maximum(below.sum(axis=1), 1)
        return (scores[0] - scores[1:])[places], (sampled[0] - sampled[1:])[places]
    measure, labels = scorer(exit_logits, metric), exit_logits.targets
    drops = measure(reference) - np.array([measure(a) for a in answers])
    resampled = np.empty((len(answers), RESAMPLES))
    for r in range(RESAMPLES):
        rows = exit_logits.units.rows_of(draw.integers(0, n, n))
        resampled[:, r] = measure(reference[rows], labels[rows])
        resampled[:, r] -= [measure(a[rows], labels[rows]) for a in answers]
    return drops[places], resampled[places]


def best_at(points: list[TradeOffPoint], speedup: float) -> TradeOffPoint:
    """The best score at a layer speed-up of at least `speedup`; of equal ones the fastest."""
    good = [p for p in points if p.layer_speedup >= speedup - 1e-12]
    return max(good, key=lambda p: (p.score, p.layer_speedup))


def fastest_within(found: list[HeldOut], max_score_drop: float) -> HeldOut | None:
    """The fastest speed-up whose bound, and that of every slower one, is within `max_score_drop`; None: not any."""
    best = None
    for held in found:
        if held.bound > max_score_drop + 1e-12:
            break
        best = held
    return best


def fastest_without_loss(found: list[HeldOut]) -> HeldOut | None:
    """The fastest speed-up with no drop on rows that did not choose its settings; None: not any. A faster one is taken
    to cost at least as much as a slower one."""
    if not found:
        return None
    smooth = isotonic_regression([held.drop for held in found]).x
    count = int((smooth <= 1e-12).sum())
    return found[count - 1] if count else None
