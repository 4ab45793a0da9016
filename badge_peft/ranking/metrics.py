"""How good a ranking is by relevance labels (nDCG@k, MRR@k), and whether it is that of full depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from badge_peft.early_exit.history import group_codes
from badge_peft.utils.checks import check_int

Array = np.ndarray


@dataclass(frozen=True)
class RankingScores:
    """Means over the queries that have a relevant candidate.

    Args:
        ndcg: nDCG@k with gains 2^label - 1.
        mrr: MRR@k: 1 / rank of the first candidate with a label above 0, 0 where it is beyond k.
        queries: How many queries these are.
    """

    ndcg: float
    mrr: float
    queries: int


def ranking_scores(scores: Any, labels: Any, query_ids: Any, top_k: int = 10) -> RankingScores:
    """nDCG@k and MRR@k of a ranking by `scores`; of equal scores the earlier row comes first.

    Args:
        scores: [N].
        labels: [N], 0 for not relevant; larger is better.
        query_ids: [N], an id for each row.
        top_k: k.

    Raises:
        ValueError: lengths that differ, a label below 0 or not finite, or no relevant candidate at all.
    """
    check_int("top_k", top_k, at_least=1, optional=False)
    scores, relevance = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (scores, labels))
    codes = group_codes(query_ids, len(scores))
    if len(relevance) != len(scores):
        raise ValueError(f"there are {len(relevance)} labels for {len(scores)} scores.")
    if not (np.isfinite(relevance) & (relevance >= 0)).all():
        raise ValueError("labels of candidates must be finite numbers, 0 (not relevant) or more.")
    assert codes is not None
    found = []
    for rows in rows_of(codes):
        gains = 2.0 ** relevance[rows] - 1
        if not gains.any():
            continue
        ranked = gains[np.argsort(-scores[rows], kind="stable")][:top_k]
        discounts = 1 / np.log2(np.arange(2, len(ranked) + 2))
        hits = np.flatnonzero(ranked)
        best = np.sort(gains)[::-1][:top_k]
        found.append((ranked @ discounts / (best @ discounts), 1 / (hits[0] + 1) if len(hits) else 0.0))
    if not found:
        raise ValueError("no query has a candidate with a label above 0, so there is nothing to score.")
    ndcg, mrr = np.mean(found, axis=0).tolist()
    return RankingScores(ndcg, mrr, len(found))


def rows_of(codes: Array) -> list[Array]:
    """The rows of each group [n], in their order."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes))[:-1])


def top_k_kept(full: Array, answers: Array, ends: Array, codes: Array, top_k: int, ordered: bool) -> Array:
    """[Q] bool: the queries whose top k is that of full depth, as a set or in order, by scores [N] at full depth and
    at the exit where each candidate stopped. Of those that went as far as any may go, `ends` [N], the top k is taken,
    and candidates with equal scores at full depth may stand for one another."""
    kept = []
    for rows in rows_of(codes):
        left = rows[ends[rows]]
        found = full[left[np.argsort(-answers[left], kind="stable")][:top_k]]
        wanted = np.sort(full[rows])[::-1][:top_k]
        kept.append(np.array_equal(found if ordered else np.sort(found)[::-1], wanted))
    return np.array(kept)
