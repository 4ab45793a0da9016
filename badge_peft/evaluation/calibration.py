"""`calibrate`: the fastest setting that keeps a score, or the best score at a speed."""

from __future__ import annotations

import warnings
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.exits import ExitLogits
from badge_peft.evaluation.metrics import Metric, exit_scores
from badge_peft.evaluation.tradeoff import TradeOffPoint, search

SETTINGS = 60  # per variant of a policy


def calibrate(
    exit_logits: ExitLogits,
    policy: str | dict[str, Any] | EarlyExitConfig = "divergence",
    max_score_drop: float | None = None,
    target_speedup: float | None = None,
    confidence: float | None = None,
    metric: Metric = "accuracy",
) -> EarlyExitConfig:
    """Chooses threshold and patience on stored exit logits.

    The fixed depths are always among the candidates, so that what is returned is never worse, on this data, than a
    fixed depth of the same cost; where one of them wins, it is returned and a warning says so.

    Args:
        exit_logits: Of data that the model was not trained on, with labels.
        policy: A name, or a config whose open fields are searched. `auto` searches every policy.
        max_score_drop: The largest loss against full depth, in units of the score (0.01 is a point of accuracy): the
            fastest setting within it is chosen.
        target_speedup: The layer speed-up to reach (0.5 saves half of the blocks): the best score at or above it.
        confidence: For example 0.95: the drop then holds on new data with this probability.
        metric: As for `exit_scores`.

    Returns:
        The config; its `calibration` records what was measured here.

    Raises:
        ValueError: not exactly one of the two goals, a goal out of range, or one that cannot be reached.
    """
    if (max_score_drop is None) == (target_speedup is None):
        raise ValueError("calibrate needs exactly one of max_score_drop and target_speedup.")
    if max_score_drop is not None and max_score_drop < 0:
        raise ValueError(f"max_score_drop={max_score_drop} is not allowed: it must be 0 or more.")
    if target_speedup is not None and not 0 <= target_speedup < 1:
        raise ValueError(
            f"target_speedup={target_speedup} is not allowed: it is the share of blocks saved, in [0, 1)."
        )
    if confidence is not None:
        raise NotImplementedError("confidence is not implemented yet in this version.")
    full = exit_scores(exit_logits, metric).per_exit[-1]
    points = search(exit_logits, policy, SETTINGS, metric)
    if max_score_drop is not None:
        good = [p for p in points if p.score >= full - max_score_drop - 1e-12]
        best = max(good, key=lambda p: (p.layer_speedup, p.score))
    else:
        good = [p for p in points if p.layer_speedup >= target_speedup - 1e-12]  # type: ignore[operator]
        if not good:
            fastest = max(p.layer_speedup for p in points)
            raise ValueError(f"target_speedup={target_speedup} cannot be reached: {fastest:.3f} is the most here.")
        best = max(good, key=lambda p: (p.score, p.layer_speedup))
    asked = policy if isinstance(policy, str) else EarlyExitConfig.of(policy).policy
    if best.config.policy == "fixed_depth" and asked not in ("fixed_depth", "auto"):
        warnings.warn(
            f"no setting of policy={asked!r} beats answering at block {best.config.depth} for every row on this data; "
            "that is what is returned. Try policy='auto'.",
            stacklevel=2,
        )
    return EarlyExitConfig.of(best.config, calibration=_record(exit_logits, best, full, metric, asked))


def _record(exit_logits: ExitLogits, point: TradeOffPoint, full: float, metric: Metric, asked: str) -> dict[str, Any]:
    return {
        "policy_asked_for": asked,
        "metric": metric if isinstance(metric, str) else metric.__name__,
        "rows": len(exit_logits),
        "score": point.score,
        "full_depth_score": full,
        "mean_exit": point.mean_exit,
        "layer_speedup": point.layer_speedup,
    }
