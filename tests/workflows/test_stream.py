"""Files in chunks: all texts, in order, no query in two of them, and what cannot be read is said by the last."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badge_peft.workflows.stream import TextFiles, chunks_of, texts_of

PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=3)), max_size=12)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chunks") / "pairs.jsonl"


def write(file: Path, pairs: list[tuple[str, str]], by_query: bool = False) -> TextFiles:
    file.write_text("".join(json.dumps({"query": a, "document": b}) + "\n" for a, b in pairs), encoding="utf-8")
    return TextFiles([str(file)], {"by_query": by_query})


@given(pairs=PAIRS, size=st.integers(1, 5), by_query=st.booleans())
def test_the_chunks_are_the_file(file: Path, pairs: list[tuple[str, str]], size: int, by_query: bool) -> None:
    pairs = sorted(pairs, key=lambda pair: pair[0]) if by_query else pairs
    chunks = list(chunks_of(write(file, pairs, by_query), 0, size))
    texts = [texts_of(chunk) for chunk in chunks]
    whole = [pair[:2] for part in texts for pair in part]
    read = [tuple(pair) for pair in json.loads(json.dumps(pairs))]
    assert [(a, b.encode("utf-16", "surrogatepass")) for a, b in whole] == [
        (a, b.encode("utf-16", "surrogatepass")) for a, b in read
    ]
    assert [chunk["start"] for chunk in chunks] == [sum(map(len, texts[:i])) for i in range(len(texts))]
    assert [chunk["last"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {(chunk["file"], chunk["error"]) for chunk in chunks} == {(0, "")}
    assert all(len(part) >= size for part in texts[:-1])
    if by_query:
        queries = [a for part in texts for a, _ in groupby(pair[0] for pair in part)]
        assert queries == [a for a, _ in groupby(a for a, _ in pairs)]
    else:
        assert all(len(part) == size for part in texts[:-1]) and len(texts[-1]) <= size


def test_what_cannot_be_read_is_said_last(file: Path) -> None:
    file.write_text('{"text": "a"}\n' * 5 + "{oh\n")
    *good, bad = chunks_of(TextFiles([str(file)]), 0, 2)
    assert [texts_of(chunk) for chunk in good] == [[("a", None)] * 2] * 2
    assert bad["last"] and bad["start"] == 4 and "line 6 is no JSON" in bad["error"] and texts_of(bad) == []
    (gone,) = chunks_of(TextFiles([str(file.with_name("no.csv"))]), 0, 2)
    assert "no file" in gone["error"]
