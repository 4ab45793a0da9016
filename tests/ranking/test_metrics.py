"""nDCG@k and MRR@k against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from badge_peft.ranking import ranking_scores


@pytest.mark.parametrize("top_k", [1, 3, 10, 50])
def test_ndcg_is_scikit_learns(top_k):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=200), rng.integers(0, 4, size=200)
    ids = rng.integers(0, 9, size=200)
    labels[ids == 3] = 0  # a query without a relevant candidate is left out
    per_query = [
        ndcg_score([2.0 ** labels[ids == q] - 1], [scores[ids == q]], k=top_k)
        for q in range(9)
        if labels[ids == q].any()
    ]
    found = ranking_scores(scores, labels, ids, top_k)
    assert found.ndcg == pytest.approx(np.mean(per_query)) and found.queries == 8


def test_mrr_by_hand():
    scores, labels = [3, 2, 1, 9, 8, 7], [0, 1, 0, 0, 0, 1]
    ids = ["a"] * 3 + ["b"] * 3
    assert ranking_scores(scores, labels, ids).mrr == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert ranking_scores(scores, labels, ids, top_k=2).mrr == pytest.approx(1 / 4)
    assert ranking_scores([1, 1, 1], [0, 1, 0], [0, 0, 0]).mrr == pytest.approx(1 / 2)  # ties: as they come


def test_what_is_refused():
    with pytest.raises(ValueError, match="no query has a candidate with a label above 0"):
        ranking_scores([1.0], [0], [0])
    with pytest.raises(ValueError, match="2 labels for 1 scores"):
        ranking_scores([1.0], [0, 1], [0])
    with pytest.raises(ValueError, match="top_k=0 is not allowed"):
        ranking_scores([1.0], [1], [0], top_k=0)
