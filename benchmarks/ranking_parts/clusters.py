"""A training-free pruning in the manner of PRISM, to compare with: no exits, one number that a validation set chooses.

After each block the model's own head reads every candidate that is left. Where these scores, as probabilities, are
spread widely enough (their deviation over their mean is at least a threshold), they are grouped into `CLUSTERS`
clusters, and the candidates of all clusters below that of the k-th best leave. Those that are left end at full depth.
Source: Zhou et al., "On-device Semantic Selection Made Low Latency and Memory Efficient with Monolithic Forwarding",
2025 (progressive cluster pruning). Differs: candidates that are surely among the top k do not leave, as their scores
are wanted, too; and nothing of the paper's way of running blocks on a device is here.
"""

from __future__ import annotations

import numpy as np

from badge_peft.ranking.metrics import rows_of

CLUSTERS = 3
ROUNDS = 20  # of k-means

Array = np.ndarray


def stops(head: Array, codes: Array, top_k: int, threshold: float) -> Array:
    """[N], the block at which each candidate stops; `head` [N, M] are scores of the model's own head behind each
    block, `codes` [N] those of the queries, `threshold` that of the spread."""
    answer = np.full(len(head), head.shape[1])
    chances = 1 / (1 + np.exp(-head.astype(np.float64)))
    for rows in rows_of(codes):
        left = rows
        for m in range(head.shape[1] - 1):
            p = chances[left, m]
            if len(left) <= top_k or p.std() < threshold * p.mean():
                continue
            cluster = clusters_of(p)
            kth = cluster[np.argsort(-p, kind="stable")[top_k - 1]]
            answer[left[cluster < kth]] = m + 1
            left = left[cluster >= kth]
    return answer


def clusters_of(values: Array) -> Array:
    """[n] -> [n], the number of each one's cluster, 0 for the lowest: k-means on a line, from quantiles on."""
    centers = np.quantile(values, (np.arange(CLUSTERS) + 0.5) / CLUSTERS)
    for _ in range(ROUNDS):
        cluster = np.abs(values[:, None] - centers).argmin(axis=1)
        moved = [values[cluster == c].mean() if (cluster == c).any() else centers[c] for c in range(CLUSTERS)]
        if np.allclose(moved, centers):
            break
        centers = np.array(moved)
    return cluster
