"""`calibrate`: the fastest setting that keeps a score, or the best score at a speed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.guarantee import is_certified, rows_needed
from badge_peft.evaluation.metrics import Metric, exit_scores, metric_name, score
from badge_peft.evaluation.tradeoff import TradeOffPoint, evaluate_policy, search
from badge_peft.utils.problem import problem_of

SETTINGS = 60  # per variant of a policy
CERTIFIED_SETTINGS = 20  # fewer where each has to pass a test


def calibrate(
    exit_logits: ExitLogits,
    policy: str | dict[str, Any] | EarlyExitConfig = "divergence",
    max_score_drop: float | None = None,
    target_speedup: float | None = None,
    confidence: float | None = None,
    metric: Metric = "accuracy",
) -> EarlyExitConfig:
    """Chooses threshold and patience on stored exit logits.

    The fixed depths between `min_exit` and `max_exit` are always among the candidates, so that what is returned is
    never worse, on this data, than one of the same cost; where one of them wins, it is returned and a warning says so.

    Args:
        exit_logits: Of data that the model was not trained on. Without labels the score is the agreement with full
            depth.
        policy: A name, or a config whose open fields are searched. `auto` searches every policy.
        max_score_drop: The largest loss against full depth, in units of the score (0.01 is a point of accuracy): the
            fastest setting within it is chosen.
        target_speedup: The layer speed-up to reach (0.5 saves half of the blocks): the best score at or above it.
        confidence: For example 0.95: with this probability the mean loss of accuracy on new data of the same kind is
            below `max_score_drop` (Learn-then-Test; half of the rows find the settings, half test them).
        metric: As for `exit_scores`.

    Returns:
        The config; its `calibration` records what was measured here.

    Raises:
        ValueError: not exactly one of the two goals, a goal out of range or out of reach, or too few rows for the
            confidence.
    """
    if (max_score_drop is None) == (target_speedup is None):
        raise ValueError("calibrate needs exactly one of max_score_drop and target_speedup.")
    if max_score_drop is not None and max_score_drop < 0:
        raise ValueError(f"max_score_drop={max_score_drop} is not allowed: it must be 0 or more.")
    if target_speedup is not None and not 0 <= target_speedup < 1:
        raise ValueError(
            f"target_speedup={target_speedup} is not allowed: it is the share of blocks saved, in [0, 1)."
        )
    scored = exit_logits if exit_logits.labels is not None else own_labels(exit_logits)
    asked = policy if isinstance(policy, str) else EarlyExitConfig.of(policy).policy
    if confidence is not None:
        best, extra = _certified(scored, policy, max_score_drop, confidence, metric)
    else:
        best, extra = (
            _best(search(scored, policy, SETTINGS, metric), _full(scored, metric), max_score_drop, target_speedup),
            {},
        )
    if best.config.policy == "fixed_depth" and asked not in ("fixed_depth", "auto"):
        warnings.warn(
            f"no setting of policy={asked!r} beats answering at block {best.config.depth} for every row on this data; "
            "that is what is returned. Try policy='auto'.",
            stacklevel=2,
        )
    scores = exit_scores(scored, metric)
    record = {
        "policy_asked_for": asked,
        "metric": metric_name(metric),
        "labels": "given" if exit_logits.labels is not None else "full depth's own answers",
        "rows": len(exit_logits),
        "score": best.score,
        "full_depth_score": _full(scored, metric),
        "exit_scores": {str(m): s for m, s in zip(scores.exit_layers, scores.per_exit, strict=True)},
        "mean_exit": best.mean_exit,
        "layer_speedup": best.layer_speedup,
        **extra,
    }
    return EarlyExitConfig.of(best.config, calibration=record)


def _best(
    points: list[TradeOffPoint], full: float, max_score_drop: float | None, target_speedup: float | None
) -> TradeOffPoint:
    if max_score_drop is not None:
        good = [p for p in points if p.score >= full - max_score_drop - 1e-12]
        if not good:  # full depth itself is out of reach
            best = max(p.score for p in points)
            raise ValueError(
                f"max_score_drop={max_score_drop} cannot be reached below max_exit: full depth scores {full:.4f} and "
                f"{best:.4f} is the most there. Allow a larger drop, or a deeper max_exit."
            )
        return max(good, key=lambda p: (p.layer_speedup, p.score))
    assert target_speedup is not None
    good = [p for p in points if p.layer_speedup >= target_speedup - 1e-12]
    if not good:
        fastest = max(p.layer_speedup for p in points)
        raise ValueError(f"target_speedup={target_speedup} cannot be reached: {fastest:.3f} is the most here.")
    return max(good, key=lambda p: (p.score, p.layer_speedup))


def _certified(
    exit_logits: ExitLogits, policy: Any, alpha: float | None, confidence: float, metric: Metric
) -> tuple[TradeOffPoint, dict[str, Any]]:
    """The fastest setting whose loss against full depth is below `alpha` on new data, with the given confidence."""
    if alpha is None or metric != "accuracy" or exit_logits.problem_type != "single_label_classification":
        raise ValueError("confidence needs max_score_drop, metric='accuracy' and one label per row.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not allowed: it is a probability, for example 0.95.")
    rows = torch.randperm(len(exit_logits), generator=torch.Generator().manual_seed(0))
    half = len(rows) // 2
    needed = rows_needed(alpha, confidence)
    if half < needed:
        raise ValueError(
            f"the data is too small: to certify a drop of at most {alpha} with confidence {confidence} takes at least "
            f"{2 * needed} rows even where no answer changes, and there are {len(rows)}. "
            "Give more rows, or allow a larger drop."
        )
    search_half, test_half = exit_logits.select(rows[:half]), exit_logits.select(rows[half:])
    right = _right(test_half, test_half.logits[:, -1])
    best = None
    for point in pareto(search(search_half, policy, CERTIFIED_SETTINGS, metric)):
        stops = torch.from_numpy(build_policy(point.config).replay_history(test_half.history()))
        losses = right - _right(test_half, test_half.answers(stops))
        if not is_certified(losses, alpha, confidence):
            break
        best = point
    if best is None:
        raise ValueError(
            f"no setting could be certified to lose at most {alpha} with confidence {confidence} on {half} test rows: "
            "give more rows, or allow more."
        )
    whole = evaluate_policy(exit_logits, best.config, metric)
    return whole, {"confidence": confidence, "max_score_drop": alpha, "test_rows": len(rows) - half}


def pareto(points: list[TradeOffPoint]) -> list[TradeOffPoint]:
    """The points that no other beats in both score and speed-up, from slow to fast."""
    front: list[TradeOffPoint] = []
    for point in sorted(points, key=lambda p: (-p.layer_speedup, -p.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front[::-1]


def _right(exit_logits: ExitLogits, answers: torch.Tensor) -> np.ndarray:
    assert exit_logits.labels is not None
    return (answers.argmax(dim=-1) == exit_logits.labels).numpy().astype(np.float64)


def _full(exit_logits: ExitLogits, metric: Metric) -> float:
    return score(exit_logits, exit_logits.logits[:, -1], metric)


def own_labels(exit_logits: ExitLogits) -> ExitLogits:
    """The same rows with full depth's own answers as labels: a score is then the agreement with full depth."""
    problem = problem_of(exit_logits.kind)
    answers = torch.from_numpy(problem.predictions(exit_logits.logits[:, -1]))
    return replace(exit_logits, labels=answers)
