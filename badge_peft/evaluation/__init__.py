"""From one full-depth pass to scores per exit, trade-off curves and wall-clock times."""

from __future__ import annotations

from badge_peft.evaluation.collect import collect_exit_logits
from badge_peft.evaluation.exits import ExitLogits
from badge_peft.evaluation.metrics import ExitScores, exit_scores

__all__ = ["ExitLogits", "ExitScores", "collect_exit_logits", "exit_scores"]
