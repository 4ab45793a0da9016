"""BM25 candidates, by the real bm25s."""

from __future__ import annotations

import pytest

from badge_peft.integrations.bm25 import retrieve

pytest.importorskip("bm25s")
CORPUS = ["glacier caves form in ice", "a dull film about a plot", "ice cream melts", "the cast of the film was poor"]


def test_the_best_come_first() -> None:
    found = retrieve(["how do glacier caves form", "film cast"], CORPUS, 2)
    assert [len(row) for row in found] == [2, 2]
    assert found[0][0] == 0 and found[1][0] == 3 and found[1][1] == 1
    assert sorted(retrieve(["ice"], CORPUS, 100)[0]) == [0, 1, 2, 3]


def test_what_is_refused() -> None:
    for queries, corpus in (([], CORPUS), (["a"], [])):
        with pytest.raises(ValueError, match="one of them is empty"):
            retrieve(queries, corpus)
    with pytest.raises(ValueError, match="candidates=0 is not allowed"):
        retrieve(["a"], CORPUS, 0)
    with pytest.raises(ValueError, match="'the' the first, has a word"):
        retrieve(["film"], ["the", "a .", ""])
