"""The candidates that a ranking adapter trains on, and those that choose its margins: given, or found by BM25."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from badge_peft.integrations.bm25 import retrieve
from badge_peft.workflows.columns import find_columns
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.settings import TextColumns, TrainColumns
from badge_peft.workflows.sources import read_source
from badge_peft.workflows.splits import EVAL_SHARE, read_parts


def read_rankings(data: str, columns: TrainColumns, seed: int) -> tuple[TextDataset, TextDataset]:
    """Candidates that train and candidates that do not, with no query in both.

    Raises:
        OSError: no such data.
        ValueError: a column or split that is not there, no pairs, or too few queries.
    """
    find = _pairs if columns.corpus is None else Retrieval(columns.corpus, columns.corpus_column, columns.candidates)
    examples, held_out = read_parts(data, columns)
    if held_out is None:
        examples = find(_fewer(examples, columns, seed), data)
        return _hold_out(examples, columns.eval_share or EVAL_SHARE, random.Random(seed))
    known = {" ".join(query.split()).casefold() for query in held_out.texts}
    kept = [i for i, query in enumerate(examples.texts) if " ".join(query.split()).casefold() not in known]
    if not kept:
        raise ValueError(f"every query of {data} is among the evaluation queries too: nothing is left to train.")
    return find(_fewer(examples.select(kept), columns, seed), data), find(held_out, columns.eval_data or data)


class Retrieval:
    """The candidates of queries, by BM25 over the documents of a file.

    Args:
        corpus: The file, or a data set of the Hub; of several splits the first.
        column: Of the documents; None: found by its name.
        candidates: How many for each query; None: 100.

    Raises:
        OSError: no such data.
        ModuleNotFoundError: bm25s is not installed.
        ValueError: no column of documents, or none in it.
    """

    def __init__(self, corpus: str, column: str | None, candidates: int | None) -> None:
        documents = next(iter(read_source(corpus).values()))
        self.name = _documents_of(documents.features, column, corpus)
        texts = (str(text) for text in documents[self.name] if text is not None)
        self.documents = [text for text in dict.fromkeys(texts) if text.strip()]
        if not self.documents:
            raise ValueError(f"no row of {corpus} has a text in column {self.name!r}.")
        self.candidates = 100 if candidates is None else candidates

    def __call__(self, queries: TextDataset, source: str) -> TextDataset:
        """The pairs of each query, each text once, with its candidates, best first; without labels.

        Raises:
            ValueError: `queries` are pairs already.
        """
        if queries.pairs is not None:
            raise ValueError(
                f"{source} has pairs already, with {queries.columns['text_pair']!r} as documents: leave out the "
                "corpus, or give a file with the queries alone."
            )
        texts = list(dict.fromkeys(queries.texts))
        found = retrieve(texts, self.documents, self.candidates)
        rows = [(text, self.documents[place]) for text, places in zip(texts, found, strict=True) for place in places]
        columns = {"text": queries.columns["text"], "text_pair": self.name, "label": None}
        return TextDataset([q for q, _ in rows], [d for _, d in rows], columns=columns, split=queries.split)


def _documents_of(features: Mapping[str, Any], column: str | None, corpus: str) -> str:
    """The column of a corpus that holds the documents."""
    there = f"the columns of {corpus} are {', '.join(features)}"
    if column is not None:
        if column not in features:
            raise ValueError(f"there is no column {column!r}: say which with --corpus-column; {there}.")
        return column
    strings = {name for name, kind in features.items() if str(getattr(kind, "dtype", "")).endswith("string")}
    try:
        names = find_columns([*features], TextColumns(), None, strings.__contains__)
    except ValueError:
        raise ValueError(
            f"cannot tell which column holds the documents: say which with --corpus-column; {there}."
        ) from None
    found = names["text_pair"] or names["text"]
    assert found is not None
    return found


def _pairs(examples: TextDataset, source: str) -> TextDataset:
    """`examples` as they are, where they are pairs.

    Raises:
        ValueError: they are not.
    """
    if examples.pairs is None:
        raise ValueError(
            f"ranking takes pairs of a query and a document, and {source} has one text per row: name the documents "
            "with --text-pair-column, or a file of documents, in which candidates are looked for, with --corpus."
        )
    return examples


def _hold_out(examples: TextDataset, share: float, draw: random.Random) -> tuple[TextDataset, TextDataset]:
    """All but a share of the queries, and these."""
    queries = sorted(set(examples.queries()))
    draw.shuffle(queries)
    held = set(queries[: max(1, round(share * len(queries)))])
    parts = [[i for i, q in enumerate(examples.queries()) if (q in held) == wanted] for wanted in (False, True)]
    if not parts[0]:
        raise ValueError(
            f"there are too few queries to hold some out: {len(queries)}. Give more, or a file of their own for "
            "the calibration with --eval-data."
        )
    return examples.select(parts[0]), examples.select(parts[1])


def _fewer(examples: TextDataset, columns: TrainColumns, seed: int) -> TextDataset:
    """At most `max_rows` rows: whole queries, drawn at random, as long as their rows fit."""
    if columns.max_rows is None or len(examples) <= columns.max_rows:
        return examples
    queries = examples.queries()
    order = sorted(set(queries))
    random.Random(seed).shuffle(order)
    rows: dict[str, list[int]] = {}
    for i, query in enumerate(queries):
        rows.setdefault(query, []).append(i)
    chosen: list[int] = []
    for query in order:
        if len(chosen) + len(rows[query]) <= columns.max_rows or not chosen:
            chosen += rows[query]
    return examples.select(sorted(chosen))
