"""BM25 candidates for queries, with `bm25s`: what a first stage sends to a reranker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from badge_peft.utils.checks import check_int
from badge_peft.utils.extras import require


def retrieve(queries: Sequence[str], corpus: Sequence[str], candidates: int = 100) -> list[list[int]]:
    """The places of each query's best documents in the corpus, best first.

    Args:
        queries: Texts.
        corpus: Documents.
        candidates: How many for each query; all, where the corpus has fewer.

    Raises:
        ModuleNotFoundError: bm25s is not installed.
        ValueError: no queries, an empty corpus, or one without a word that counts, or `candidates` below 1.
    """
    require("ranking", "bm25s")
    import bm25s

    check_int("candidates", candidates, at_least=1, optional=False)
    if not queries or not corpus:
        raise ValueError("BM25 needs queries and a corpus of documents: one of them is empty.")
    documents: Any = bm25s.tokenize(list(corpus), stopwords="en", show_progress=False)
    if not documents.vocab:
        raise ValueError(
            f"no document of the corpus, {corpus[0][:40]!r} the first, has a word that BM25 looks for: words of two "
            "letters or more, and more than 'the' or 'and'. Give another corpus, or another column of it."
        )
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    tokens = bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
    places, _ = index.retrieve(tokens, k=min(candidates, len(corpus)), show_progress=False)
    return [row.tolist() for row in np.asarray(places)]
