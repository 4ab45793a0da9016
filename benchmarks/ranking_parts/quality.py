"""What is kept of a ranking, and how many blocks it takes: exits, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from badge_peft import EarlyExitConfig, ExitLogits
from badge_peft.early_exit.policies import build_policy
from badge_peft.ranking import calibrate_ranking, ranking_scores
from badge_peft.ranking.metrics import rows_of, top_k_kept
from ranking_parts.clusters import stops as cluster_stops
from ranking_parts.scores import PoolScores

KS = (1, 3, 10)
KEEP = 0.95
THRESHOLDS = (0.0, *np.geomspace(1e-4, 10, 60).tolist())  # of `clusters`

Array = np.ndarray
Measured = dict[str, Any]


@dataclass(frozen=True)
class Ranking:
    """How the candidates of some queries were ranked: of each [N] the score of the exit at which it stopped, its
    block, full depth's score, the code of its query, relevance; and M."""

    answers: Array
    stops: Array
    full: Array
    codes: Array
    labels: Array
    blocks: int

    def measure(self, top_k: int) -> Measured:
        """Shares of queries and blocks, and what relevance says; nDCG and MRR are those at 10."""
        ends = self.stops == self.stops.max()
        kept = top_k_kept(self.full, self.answers, ends, self.codes, top_k, ordered=False)
        # those that went deeper come first
        ranks = self.answers.astype(np.float64) + self.stops * (float(np.ptp(self.answers)) + 1)
        early = ranking_scores(ranks, self.labels, self.codes)
        return {
            "top_k": top_k,
            "kept": float(kept.mean()),
            "recall": float(np.mean([self._recall(rows, ranks, top_k) for rows in rows_of(self.codes)])),
            "saved": float(1 - self.stops.mean() / self.blocks),
            "ndcg": early.ndcg,
            "mrr": early.mrr,
        }

    def _recall(self, rows: Array, ranks: Array, top_k: int) -> float:
        """Share of full depth's top k that are among the first k."""
        wanted, found = (rows[np.argsort(-x[rows], kind="stable")[:top_k]] for x in (self.full, ranks))
        return len(np.intersect1d(wanted, found)) / len(wanted)


def ranked_by(stored: ExitLogits, config: EarlyExitConfig) -> Ranking:
    """By a policy, replayed."""
    stops = build_policy(config).replay_history(stored.history())
    places = np.searchsorted(stored.exits, stops)
    scores = stored.logits[:, :, 0].numpy()
    return _ranking(stored, scores[np.arange(len(stops)), places], stops)


def ranked_by_clusters(stored: ExitLogits, top_k: int, threshold: float) -> Ranking:
    """By `clusters`, on the scores of the model's own head behind each block."""
    scores = stored.logits[:, :, 0].numpy()
    stops = cluster_stops(scores, stored.groups.numpy(), top_k, threshold)
    return _ranking(stored, scores[np.arange(len(stops)), stops - 1], stops)


def _ranking(stored: ExitLogits, answers: Array, stops: Array) -> Ranking:
    assert stored.labels is not None
    full = stored.logits[:, -1, 0].numpy()
    labels = stored.labels.numpy()
    return Ranking(answers, stops, full, stored.groups.numpy(), labels, stored.depth)


@dataclass(frozen=True)
class Settings:
    """What so many queries of a pool choose: margins of the exits for a seed and k, and for each k margins on the
    model's own head and the threshold of clusters."""

    margins: dict[tuple[int, int], EarlyExitConfig]
    own: dict[int, EarlyExitConfig]
    clusters: dict[int, float]
    queries: int

    @classmethod
    def of(cls, pool: PoolScores, seeds: Sequence[int]) -> Settings:
        """The fastest that keep enough of the queries."""
        exits = {seed: pool.of_seed(i) for i, seed in enumerate(seeds)}
        head = pool.of_head()
        return cls(
            {(seed, k): calibrate_ranking(exits[seed], top_k=k, keep=KEEP) for seed in seeds for k in KS},
            {k: calibrate_ranking(head, top_k=k, keep=KEEP) for k in KS},
            {k: _fastest_clusters(head, k) for k in KS},
            len(pool.pool.queries()),
        )


def compare(chosen: Settings, test: PoolScores, seeds: Sequence[int]) -> dict[str, Any]:
    """What settings are worth on the queries of a pool: `rows`, one for each way, seed and k; `full`, relevance at
    full depth; `first_stage`, that of BM25; the numbers of queries and candidates."""
    rows: list[Measured] = []
    head = test.of_head()
    for k in KS:
        for i, seed in enumerate(seeds):
            rows += _of_exits(chosen.margins[seed, k], test.of_seed(i), k, seed)
        rows.append({"way": "margins on the model's own head", **ranked_by(head, chosen.own[k]).measure(k)})
        rows.append({"way": "clusters", **ranked_by_clusters(head, k, chosen.clusters[k]).measure(k)})
    labels = test.pool.labels
    groups = test.pool.groups
    full = ranking_scores(test.full, labels, groups)
    first = ranking_scores(test.pool.first_stage(), labels, groups)
    return {
        "rows": rows,
        "full": {"ndcg": full.ndcg, "mrr": full.mrr},
        "first_stage": {"ndcg": first.ndcg, "mrr": first.mrr},
        "calibration_queries": chosen.queries,
        "queries": len(test.pool.queries()),
        "candidates": len(test.pool) / len(test.pool.queries()),
        "correlations": [rank_correlation(test.exits[i], test.of_seed(i).groups.numpy()) for i in range(len(seeds))],
        "exits": test.numbers,
    }


def _of_exits(config: EarlyExitConfig, test: ExitLogits, k: int, seed: int) -> list[Measured]:
    """Margins on exits, and one depth for all candidates: the exit that costs most nearly the same."""
    found = ranked_by(test, config)
    mean = float(found.stops.mean())
    depth = min((number for number in test.exits if number), key=lambda number: abs(number - mean))
    fixed = EarlyExitConfig(policy="fixed_depth", depth=depth, top_k=k)
    return [
        {"way": "exits", "seed": seed, **found.measure(k)},
        {"way": "one depth", "seed": seed, "depth": depth, **ranked_by(test, fixed).measure(k)},
    ]


def _fastest_clusters(stored: ExitLogits, k: int) -> float:
    """The threshold with the fewest blocks that keeps enough queries; where none does, that which keeps most."""
    found = [(t, ranked_by_clusters(stored, k, t).measure(k)) for t in THRESHOLDS]
    enough = min(KEEP, max(measured["kept"] for _, measured in found)) - 1e-12
    return max((pair for pair in found if pair[1]["kept"] >= enough), key=lambda pair: pair[1]["saved"])[0]


def rank_correlation(scores: Array, codes: Array) -> list[float]:
    """[E]: Spearman's, of each exit with full depth within a query; the mean over queries."""
    found = []
    for rows in rows_of(codes):
        ranks = scores[rows].argsort(axis=0, kind="stable").argsort(axis=0, kind="stable").astype(np.float64)
        found.append(np.corrcoef(ranks.T)[-1])
    return np.nan_to_num(np.mean(found, axis=0)).tolist()
