"""`calibrate`: the fastest setting that keeps a score, or the best score at a speed; with a bound on new data.

What a setting costs is measured by cross-fitting (`cross_fit.py`), or bounded by a test (`confidence.py`).
"""

from __future__ import annotations

import warnings
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import FixedDepthPolicy
from badge_peft.evaluation.confidence import certified
from badge_peft.evaluation.cross_fit import HeldOut, best_at, cross_fit, fastest_within, fastest_without_loss
from badge_peft.evaluation.curve import curve_record, setting_curve
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric, exit_scores, metric_name
from badge_peft.evaluation.tradeoff import TradeOffPoint, search
from badge_peft.utils.checks import check_number

SETTINGS = 60  # per variant of a policy


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
            chosen whose drop lies below it at a level of 65% (`cross_fit.LEVEL`). Where the rows cannot carry
            that, a warning says so, and the answer is the fastest setting that loses nothing, here and on rows
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
    if confidence is not None:
        best, rows = certified(scored, policy, max_score_drop, confidence, metric, per_exit)
        bound = {"confidence": confidence, "max_score_drop": max_score_drop, "test_rows": rows}
    else:
        best, held = _cross_fitted(scored, policy, metric, reference, max_score_drop, target_speedup)
        if per_exit:
            each = _cross_fitted(scored, policy, metric, reference, max_score_drop, target_speedup, per_exit=True)
            if _wins(each[1], held, target_speedup):
                best, held = each
        if held is not None:
            bound = {"drop": held.drop, "drop_interval": [held.low, held.high], "drop_from": reference}
    if max_score_drop is not None and not bound:
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
            f"max_score_drop={max_score_drop} cannot be reached between min_exit and max_exit: {name} scores "
            f"{wanted:.4f} and {most:.4f} is the most there. Allow a larger drop, an earlier min_exit or a deeper "
            "max_exit."
        )
    found = cross_fit(exit_logits, policy, metric, reference, per_exit=per_exit)
    held = fastest_within(found, max_score_drop)
    if held is not None:
        return best_at(points, held.goal), held
    free = fastest_without_loss(found)
    if free is not None and (point := best_at(points, free.goal)).score >= wanted - 1e-12:
        return point, None
    fixed = [p for p in points if p.config.policy == FixedDepthPolicy.name]
    plain = max(fixed, key=lambda p: (p.score, -p.mean_exit) if reference == "best" else (p.mean_exit, 0))
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
