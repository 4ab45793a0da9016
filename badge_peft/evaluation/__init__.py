"""From one full-depth pass to scores per exit, trade-off curves and wall-clock times."""

from __future__ import annotations

from badge_peft.evaluation.calibration import calibrate
from badge_peft.evaluation.collect import collect_exit_logits
from badge_peft.evaluation.costs import CostModel, measure_costs
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.latency import LatencyReport, measure_latency
from badge_peft.evaluation.metrics import ExitScores, exit_scores
from badge_peft.evaluation.plots import plot_tradeoff
from badge_peft.evaluation.tradeoff import TradeOff, TradeOffPoint, evaluate_policy, sweep

__all__ = [
    "CostModel",
    "ExitLogits",
    "ExitScores",
    "LatencyReport",
    "TradeOff",
    "TradeOffPoint",
    "calibrate",
    "collect_exit_logits",
    "evaluate_policy",
    "exit_scores",
    "measure_costs",
    "measure_latency",
    "plot_tradeoff",
    "sweep",
]
