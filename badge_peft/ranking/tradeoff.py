"""`sweep_ranking`: what margins cost and save, from none to wide ones."""

from __future__ import annotations

from dataclasses import replace

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.tradeoff import TradeOff
from badge_peft.ranking.calibration import METRIC, evaluate_ranking, ranking_front


def sweep_ranking(exit_logits: ExitLogits, top_k: int = 10, points: int = 20) -> TradeOff:
    """The trade-off of `top_k` on stored scores that have `groups`, and the fixed depths beside it, where all
    candidates stop at one block.

    Args:
        exit_logits: Of the candidates of some queries.
        top_k: k.
        points: Of the policy's curve, spread over its speed-ups.

    Returns:
        The points, with the fixed depths first; the score is the share of queries with full depth's top k.
    """
    depths = [EarlyExitConfig(policy="fixed_depth", depth=m, top_k=top_k) for m in reversed(exit_logits.exits)]
    fixed = [replace(evaluate_ranking(exit_logits, config), name="fixed_depth") for config in depths]
    front = ranking_front(exit_logits, EarlyExitConfig(policy="top_k", top_k=top_k))
    steps = {round(i * (len(front) - 1) / max(points - 1, 1)) for i in range(points)}
    return TradeOff([*fixed, *(front[i] for i in sorted(steps))], METRIC, exit_logits.depth)
