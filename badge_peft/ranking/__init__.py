"""Ranking with cross-encoders: the candidates of a query leave as soon as they cannot reach its top k."""

from __future__ import annotations

from badge_peft.ranking.calibration import calibrate_ranking, sweep_ranking
from badge_peft.ranking.metrics import RankingScores, ranking_scores
from badge_peft.ranking.pairs import ExitReport
from badge_peft.ranking.reranker import EarlyExitReranker

__all__ = [
    "EarlyExitReranker",
    "ExitReport",
    "RankingScores",
    "calibrate_ranking",
    "ranking_scores",
    "sweep_ranking",
]
