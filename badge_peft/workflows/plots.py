"""The trade-off as a picture, where matplotlib is there to draw it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation import ExitLogits, evaluate_policy, sweep
from badge_peft.evaluation.plots import plot_tradeoff

PICTURE = "tradeoff.png"


def draw(exit_logits: ExitLogits, chosen: EarlyExitConfig, metric: str, path: Path, title: str) -> bool:
    """Draws the usual policies and the chosen one; False where matplotlib is missing.

    Args:
        exit_logits: Without labels the score is the agreement with full depth.
        chosen: Marked with a star.
        metric: As for `exit_scores`.
        path: Of the picture.
        title: Above it.
    """
    if find_spec("matplotlib") is None:
        return False
    scored = exit_logits.labeled()
    if exit_logits.labels is None:
        title += ", scored against full depth's answers"
    plot_tradeoff(sweep(scored, metric=metric), path, title, chosen=evaluate_policy(scored, chosen, metric))
    return True
