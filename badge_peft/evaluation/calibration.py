"""`calibrate`: the fastest setting that keeps a score, or the best score at a speed; with a bound on new data.

What a setting costs is measured by cross-fitting (`cross_fit.py`). With `confidence` it is bounded by Learn-then-Test
with a betting test: candidates are found on one half of the data and ordered from slow to fast; on the other half each
is tested in turn ("its expected loss exceeds alpha"), and the first that cannot be rejected ends the walk. The walk
keeps the probability of returning a setting with a larger loss at 1 - confidence, however many are tried.

Sources: Angelopoulos et al., "Learn then Test", 2021; Laufer-Goldshtein et al., "Efficiently Controlling Multiple
Risks with Pareto Testing", 2023. The test is the betting martingale of Waudby-Smith and Ramdas, "Estimating means of
bounded random variables by betting", 2024, which notices that most rows keep their answer.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import FixedDepthPolicy, build_policy
from badge_peft.evaluation.cross_fit import HeldOut, best_at, cross_fit, fastest_within, fastest_without_loss
from badge_peft.evaluation.curve import curve_record, setting_curve
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric, exit_scores, metric_name
from badge_peft.evaluation.tradeoff import TradeOffPoint, evaluate_policy, pareto, search
from badge_peft.utils.checks import check_number
from badge_peft.utils.problem import problem_of

SETTINGS = 60  # per variant of a policy
CERTIFIED_SETTINGS = 20  # fewer where each has to pass a test
_LARGEST_BET = 0.75  # share of the wealth that one row can lose


def calibrate(
    exit_logits: ExitLogits,
    policy: str | dict[str, Any] | EarlyExitConfig = "divergence",
    max_score_drop: float | None = None,
    target_speedup: float | None = None,
    confidence: float | None = None,
    metric: Metric = "accuracy",
    per_exit: bool = False,
) -> EarlyExitConfig:
    """Chooses threshold and patience on stored exit logits.

    The fixed depths between `min_exit` and `max_exit` are always among the candidates, so that what is returned is
    never worse, on this data, than one of the same cost; where one of them wins, it is returned and a warning says so.

    A drop is counted from full depth where that is the deployed model's own head (`ExitLogits.deployed`) or where
    there are no labels, else from the best exit. It is measured on rows that did not choose the settings.

    Args:
        exit_logits: Of data that the model was not trained on. Without labels the score is the agreement with full
            depth.
        policy: A name, or a config whose open fields are searched. `auto` searches every policy.
        max_score_drop: The largest loss, in units of the score (0.01 is a point of accuracy): the fastest setting is
            chosen whose drop lies below it with a probability of 75% (`cross_fit.LEVEL`). Where the rows cannot
            carry that, a warning says so, and the answer is the fastest setting that loses nothing, here and on rows
            that did not choose it; or else the exit that drops are counted from, for every row.
        target_speedup: The layer speed-up to reach (0.5 saves half of the blocks): the best score at or above it.
        confidence: For example 0.95: with this probability the mean loss of accuracy on new data of the same kind is
            below `max_score_drop` against full depth (Learn-then-Test; half of the rows find the settings, half test
            them); of token classification the mean over texts of what their tokens lose.
        metric: As for `exit_scores`.
        per_exit: Also try settings that differ from exit to exit: a threshold for each, and for `max_prob` a
            temperature for each, fitted on the labels. They are taken where they save more, or at a `target_speedup`
            lose less, on rows that did not choose them. Not tried where a policy counts exits in a row.

    Returns:
        The config; its `calibration` records what was measured here: `score` on all of these rows, `drop`, of rows
        that did not choose the setting, with a 90% interval, and as `curve` what other thresholds would cost and give.

    Raises:
        ValueError: not exactly one of the two goals, a goal out of range or out of reach, or too few rows for the
            confidence.
    """
    if (max_score_drop is None) == (target_speedup is None):
        raise ValueError("calibrate needs exactly one of max_score_drop and target_speedup.")
    check_number("max_score_drop", max_score_drop, lambda drop: drop >= 0, "it must be 0 or more")
    saved = "it is the share of blocks saved, in [0, 1)"
    check_number("target_speedup", target_speedup, lambda share: 0 <= share < 1, saved)
    scored = exit_logits.labeled()
    scores = exit_scores(scored, metric)
    reference = "best" if exit_logits.labels is not None and not exit_logits.deployed else "last"
    full = scores.per_exit[-1]
    asked = policy if isinstance(policy, str) else EarlyExitConfig.of(policy).policy
    bound: dict[str, Any] = {}
    shown = True
    if confidence is not None:
        best, rows = _certified(scored, policy, max_score_drop, confidence, metric, per_exit)
        bound = {"confidence": confidence, "max_score_drop": max_score_drop, "test_rows": rows}
    else:
        best, held = _cross_fitted(scored, policy, metric, reference, max_score_drop, target_speedup)
        if per_exit:
            each = _cross_fitted(scored, policy, metric, reference, max_score_drop, target_speedup, per_exit=True)
            if _wins(each[1], held, target_speedup):
                best, held = each
        shown = held is not None or max_score_drop is None
        if held is not None:
            bound = {"drop": held.drop, "drop_interval": [held.low, held.high], "drop_from": reference}
    if not shown:
        warnings.warn(
            f"{len(scored.units)} rows cannot show that any setting loses at most {max_score_drop}, so "
            f"{_instead(best.config)} is returned. Give more rows, or allow more.",
            stacklevel=2,
        )
    elif best.config.policy == "fixed_depth" and asked not in ("fixed_depth", "auto"):
        warnings.warn(
            f"no setting of policy={asked!r} beats answering at block {best.config.depth} for every row on this data; "
            "that is what is returned. Try policy='auto'.",
            stacklevel=2,
        )
    record = {
        "policy_asked_for": asked,
        "metric": metric_name(metric),
        "labels": "given" if exit_logits.labels is not None else "full depth's own answers",
        "rows": len(exit_logits.units),
        **({} if exit_logits.texts is None else {"tokens": len(exit_logits)}),
        "weights_hash": exit_logits.weights_hash,
        "score": best.score,
        "full_depth_score": full,
        "exit_scores": {str(m): s for m, s in zip(scores.exit_layers, scores.per_exit, strict=True)},
        "mean_exit": best.mean_exit,
        "layer_speedup": best.layer_speedup,
        "curve": curve_record(scored, setting_curve(scored, best.config, metric)),
        **bound,
    }
    return EarlyExitConfig.of(best.config, calibration=record)


def _cross_fitted(
    exit_logits: ExitLogits,
    policy: Any,
    metric: Metric,
    reference: str,
    max_score_drop: float | None,
    target_speedup: float | None,
    per_exit: bool = False,
) -> tuple[TradeOffPoint, HeldOut | None]:
    """The setting, and what its speed-up costs on rows that did not choose it; None where that cannot be told."""
    points = search(exit_logits, policy, SETTINGS, metric, per_exit)
    most, fastest = max(p.score for p in points), max(p.layer_speedup for p in points)
    if max_score_drop is None:
        assert target_speedup is not None
        if fastest < target_speedup - 1e-12:
            raise ValueError(f"target_speedup={target_speedup} cannot be reached: {fastest:.3f} is the most here.")
        found = cross_fit(exit_logits, policy, metric, reference, [target_speedup], per_exit=per_exit)
        return best_at(points, target_speedup), next(iter(found), None)
    scores = exit_scores(exit_logits, metric)
    wanted = scores.best if reference == "best" else scores.per_exit[-1]
    if most < wanted - max_score_drop - 1e-12:
        name = "the best exit" if reference == "best" else "full depth"
        raise ValueError(
            f"max_score_drop={max_score_drop} cannot be reached below max_exit: {name} scores {wanted:.4f} and "
            f"{most:.4f} is the most there. Allow a larger drop, or a deeper max_exit."
        )
    found = cross_fit(exit_logits, policy, metric, reference, per_exit=per_exit)
    held = fastest_within(found, max_score_drop)
    if held is not None:
        return best_at(points, held.goal), held
    fixed = [p for p in points if p.config.policy == FixedDepthPolicy.name]
    plain = max(fixed, key=lambda p: (p.score, -p.mean_exit) if reference == "best" else (p.mean_exit, 0))
    free = fastest_without_loss(found)
    if free is not None and (point := best_at(points, free.goal)).score >= wanted - 1e-12:
        return point, None
    if plain.score < wanted - max_score_drop - 1e-12:  # below a max_exit
        return max(points, key=lambda p: (p.score, -p.layer_speedup)), None
    return plain, None


def _instead(config: EarlyExitConfig) -> str:
    """What is returned where no drop could be shown."""
    if config.policy == FixedDepthPolicy.name:
        return f"a setting that answers every row at block {config.depth}"
    return "the fastest setting that loses nothing here and on rows that did not choose it"


def _wins(held: HeldOut | None, other: HeldOut | None, target_speedup: float | None) -> bool:
    """Whether what `held` was measured of is better than `other` on rows that chose neither."""
    if held is None or other is None:
        return held is not None
    return held.drop < other.drop if target_speedup is not None else held.goal > other.goal


def _certified(
    exit_logits: ExitLogits, policy: Any, alpha: float | None, confidence: float, metric: Metric, per_exit: bool
) -> tuple[TradeOffPoint, int]:
    """The fastest setting whose loss against full depth is below `alpha` on new data, with the given confidence; and
    the number of rows that tested it."""
    needed = rows_to_certify(alpha, confidence, metric, exit_logits.kind)
    assert alpha is not None
    units = exit_logits.units
    rows = torch.randperm(len(units), generator=torch.Generator().manual_seed(0)).numpy()
    half = len(rows) // 2
    if len(rows) < needed:
        raise ValueError(
            f"the data is too small: to certify a drop of at most {alpha} with confidence {confidence} takes at least "
            f"{needed} rows even where no answer changes, and there are {len(rows)}. "
            "Give more rows, or allow a larger drop."
        )
    search_half, test_half = (
        exit_logits.select(torch.from_numpy(units.rows_of(part))) for part in (rows[:half], rows[half:])
    )
    assert test_half.labels is not None
    error = problem_of(test_half.kind).error  # [n], 1 where the answer is wrong
    full_depth = error(test_half.logits[:, -1], test_half.labels)
    best = None
    for point in pareto(search(search_half, policy, CERTIFIED_SETTINGS, metric, per_exit)):
        stops = torch.from_numpy(build_policy(point.config).replay_history(test_half.history()))
        losses = (error(test_half.answers(stops), test_half.labels) - full_depth).numpy()
        losses = test_half.units.total(losses) / test_half.units.sizes  # of tokens, the mean over those of a text
        if not _is_certified(losses, alpha, confidence):
            break
        best = point
    if best is None:
        raise ValueError(
            f"no setting could be certified to lose at most {alpha} with confidence {confidence} on {half} test rows: "
            "give more rows, or allow more."
        )
    return evaluate_policy(exit_logits, best.config, metric), len(test_half.units)


def rows_to_certify(max_score_drop: float | None, confidence: float, metric: Metric, problem_type: str) -> int:
    """How many rows a bound takes, those that find the settings among them, even where no answer changes.

    Raises:
        ValueError: there is no bound for such a goal, metric or problem type.
    """
    if max_score_drop is None or metric != "accuracy" or problem_type != "single_label_classification":
        raise ValueError("confidence needs max_score_drop, metric='accuracy' and one label per row.")
    check_number("confidence", confidence, lambda p: 0 < p < 1, "it is a probability, for example 0.95")
    share = "with confidence it is a share of the rows, below 1 (0.01 is a point of accuracy)"
    check_number("max_score_drop", max_score_drop, lambda drop: drop < 1, share)
    return 2 * rows_needed(max_score_drop, confidence)


def rows_needed(alpha: float, confidence: float) -> int:
    """Rows below which not even a setting that changes no answer can be certified."""
    growth = math.log1p(_LARGEST_BET * alpha / (1 - alpha))
    return math.ceil(math.log(1 / (1 - confidence)) / growth) if growth > 0 else 2**31


def _is_certified(losses: np.ndarray, alpha: float, confidence: float) -> bool:
    """Whether data rejects "the mean loss is alpha or more".

    The wealth of a bet that pays where losses are small is a non-negative supermartingale under that hypothesis, so it
    reaches 1 / (1 - confidence) with probability at most 1 - confidence.

    Args:
        losses: [n], in [-1, 1]: 1 where a right answer was lost, -1 where one was won.
        alpha: In [0, 1).
        confidence: In (0, 1).
    """
    gains = (1 - losses.astype(np.float64)) / 2  # in [0, 1]; its mean is at most `fair` under the hypothesis
    fair = (1 - alpha) / 2
    n = len(gains)
    before = np.concatenate([[0.0], np.cumsum(gains)[:-1]])
    squares = np.concatenate([[0.0], np.cumsum(gains**2)[:-1]])
    seen = np.arange(n)
    mean = (before + 0.5) / (seen + 1)
    variance = np.maximum((squares + 0.25) / (seen + 1) - mean**2, 1e-12)  # of the rows before, so the bet is fair
    bets = np.minimum(np.sqrt(2 * math.log(1 / (1 - confidence)) / (n * variance)), _LARGEST_BET / fair)
    wealth = np.cumsum(np.log1p(bets * (gains - fair)))
    return bool(n and wealth.max() >= math.log(1 / (1 - confidence)))
