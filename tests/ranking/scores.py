"""Stored exit scores as a ranking adapter gives them: exits agree with full depth more and more."""

from __future__ import annotations

import numpy as np

QUERIES, CANDIDATES, EXITS = 40, 25, 5


def make_scores(queries: int = QUERIES, candidates: int = CANDIDATES, exits: int = EXITS, seed: int = 0):
    """Scores [N, E], query ids [N] and relevance labels [N]."""
    rng = np.random.default_rng(seed)
    n = queries * candidates
    full = rng.normal(size=n)
    noise = rng.normal(size=(n, exits)) * np.linspace(0.7, 0.0, exits)
    offsets = rng.normal(size=(queries, exits)).repeat(candidates, axis=0) * np.linspace(1, 0, exits)
    ids = np.arange(queries).repeat(candidates)
    labels = (full + 0.5 * rng.normal(size=n) > 1.2).astype(float)
    order = rng.permutation(n)  # rows of a query need not lie together
    return (full[:, None] + noise + offsets).astype(np.float32)[order], ids[order], labels[order]
