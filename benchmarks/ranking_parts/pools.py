"""Candidates of queries: what BM25 finds in all documents of a split, with relevance, as a jsonl file of pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import read_lines

from badge_peft.integrations.bm25 import retrieve

Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """The candidates of some queries, each query's side by side, best of BM25 first: rows of `query_id`, `query`,
    `document` and `label`."""

    name: str
    rows: list[Row]

    @classmethod
    def load(cls, path: Path) -> Pool:
        return cls(path.stem, read_lines(path))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> list[str]:
        """[N], the query of each row."""
        return [row["query_id"] for row in self.rows]

    @property
    def labels(self) -> np.ndarray:
        """[N], relevance."""
        return np.array([row["label"] for row in self.rows], dtype=np.float64)

    def queries(self) -> dict[str, list[Row]]:
        """The rows of each query."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row["query_id"], []).append(row)
        return found

    def first_stage(self) -> np.ndarray:
        """[N], scores that rank as BM25 does."""
        return np.concatenate([-np.arange(len(rows), dtype=np.float64) for rows in self.queries().values()])


def pool_of_pairs(path: Path, out: Path, queries: int, candidates: int, keep: int | None = None) -> Pool:
    """A pool of so many queries, at most, that have an answer among the labeled pairs of a file, whose documents are
    the corpus; of the `candidates` of each query `keep` are kept, drawn at random. What is in `out` already is
    read."""
    if not out.exists():
        rows = read_lines(path)
        corpus = list(dict.fromkeys(row["document"] for row in rows))
        texts = {row["query_id"]: row["query"] for row in rows}
        relevant: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["label"]:
                relevant.setdefault(row["query_id"], {})[row["document"]] = row["label"]
        _write(out, {q: texts[q] for q in relevant}, corpus, relevant, queries, candidates, keep)
    return Pool.load(out)


def pool_of_collection(folder: Path, out: Path, queries: int, candidates: int) -> Pool:
    """A pool of a test collection in the form of Cranfield's: queries.jsonl, corpus.jsonl and judgments.jsonl. A
    judgment with a grade above 0 is relevant."""
    if not out.exists():
        documents = {row["document_id"]: row["text"] for row in read_lines(folder / "corpus.jsonl")}
        texts = {row["query_id"]: row["query"] for row in read_lines(folder / "queries.jsonl")}
        relevant: dict[str, dict[str, float]] = {}
        for row in read_lines(folder / "judgments.jsonl"):
            if row["grade"] > 0 and row["document_id"] in documents:
                relevant.setdefault(row["query_id"], {})[documents[row["document_id"]]] = 1
        corpus = [text for text in dict.fromkeys(documents.values()) if text.strip()]
        _write(
            out,
            {q: texts[q] for q in texts if q in relevant},
            corpus,
            relevant,
            queries,
            candidates,
            None,
        )
    return Pool.load(out)


def _write(
    out: Path,
    texts: Mapping[Any, str],
    corpus: Sequence[str],
    relevant: Mapping[Any, Mapping[str, float]],
    queries: int,
    candidates: int,
    keep: int | None,
) -> None:
    draw = random.Random(0)
    chosen = draw.sample(sorted(texts), min(len(texts), queries))
    with out.open("w", encoding="utf-8") as file:
        for query, places in zip(
            chosen,
            retrieve([texts[q] for q in chosen], corpus, candidates),
            strict=True,
        ):
            kept = sorted(draw.sample(range(len(places)), min(keep or len(places), len(places))))
            for place in (places[i] for i in kept):
                label = relevant[query].get(corpus[place], 0)
                row = {
                    "query_id": str(query),
                    "query": texts[query],
                    "document": corpus[place],
                    "label": label,
                }
                file.write(json.dumps(row) + "\n")
