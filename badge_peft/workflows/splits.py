"""Rows that train and rows that do not, with no text, or no query, in both."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from badge_peft.integrations.bm25 import retrieve
from badge_peft.workflows.columns import find_columns
from badge_peft.workflows.data import TextDataset, pick_split, read_examples
from badge_peft.workflows.settings import TextColumns, TrainColumns
from badge_peft.workflows.sources import read_source

SPLITS = ("train", "validation", "test")
EVAL_SHARE = 0.2  # of the texts, to evaluate and calibrate on
_EVAL_FRACTION = 0.16  # of a source that has not been split, for each of validation and test
Key = tuple[str, ...]  # of a text, or a pair of them: see `TextDataset.keys`
_VALIDATION = ("validation", "dev", "valid", "val")


def read_training_data(
    data: str, columns: TrainColumns, seed: int, by_query: bool = False
) -> tuple[TextDataset, TextDataset]:
    """Training rows and evaluation rows, those of a file or a split of their own, or held out, with no text in both;
    `by_query` with no query in both, each with all its candidates, which BM25 finds where a corpus is named."""
    splits = read_source(data, columns.dataset_config)
    examples = pick_split(splits, data, columns, training=True)
    candidates = _Candidates(columns) if by_query else None
    held_out, wanted = None, columns.eval_split
    if columns.eval_data is not None:
        held_out = read_examples(columns.eval_data, replace(columns, split=wanted))
    else:
        if wanted is None and columns.eval_share is None:
            wanted = next((name for name in splits if name != columns.split and name.startswith(_VALIDATION)), None)
        held_out = None if wanted is None else pick_split(splits, data, replace(columns, split=wanted))
    if held_out is not None:
        examples = _without(examples, held_out, data, "queries" if by_query else "texts")
    examples = _fewer(examples, columns.max_rows, seed, by_query)
    if candidates is not None:
        examples = candidates(examples, data)
        held_out = None if held_out is None else candidates(held_out, columns.eval_data or data)
    if held_out is None:
        return hold_out(examples, columns.eval_share or EVAL_SHARE, seed, by_query)
    return examples, held_out


def _without(examples: TextDataset, held_out: TextDataset, data: str, what: str) -> TextDataset:
    """The rows whose texts, or queries, are not held out."""
    width = 1 if what == "queries" else 2  # a query is the first text of a pair
    known = {key[:width] for key in held_out.keys()}
    others = [i for i, key in enumerate(examples.keys()) if key[:width] not in known]
    if not others:
        raise ValueError(f"all {what} of {data} are among the evaluation {what} too: nothing is left to train.")
    if len(others) < len(examples):
        warnings.warn(
            f"{len(examples) - len(others)} of {len(examples)} rows are not trained on: their {what} are among the "
            f"evaluation {what}, too.",
            stacklevel=2,
        )
    return examples.select(others)


def _fewer(examples: TextDataset, most: int | None, seed: int, by_query: bool) -> TextDataset:
    """At most so many rows, drawn at random; or whole queries, as long as their rows fit."""
    if most is None or len(examples) <= most:
        return examples
    draw = random.Random(seed)
    if not by_query:
        return examples.select(draw.sample(range(len(examples)), most))
    rows = examples.rows_of_queries()
    order, chosen = sorted(rows), list[int]()
    draw.shuffle(order)
    for query in order:
        if len(chosen) + len(rows[query]) <= most or not chosen:
            chosen += rows[query]
    return examples.select(sorted(chosen))


def hold_out(
    examples: TextDataset, fraction: float, seed: int, by_query: bool = False
) -> tuple[TextDataset, TextDataset]:
    """Training rows, and a `fraction` in (0, 1) of the texts, or queries, for evaluation; none is in both, and no
    class is in the second alone."""
    keys: list[Any] = examples.queries() if by_query else examples.keys()
    different = sorted(set(keys)) if by_query else list(dict.fromkeys(keys))
    random.Random(seed).shuffle(different)
    count = max(1, round(fraction * len(different)))
    if len(different) <= count:
        raise ValueError(
            f"there are too few different {'queries' if by_query else 'texts'} to hold some out: {len(different)}. "
            "Give more, or a separate file for the calibration with --eval-data."
        )
    held_out = set(different[:count])
    if not by_query:
        held_out -= _needed(examples, keys, held_out)
    parts: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        parts[key in held_out].append(i)
    return examples.select(parts[0]), examples.select(parts[1])


def _needed(examples: TextDataset, keys: list[Key], held_out: set[Key]) -> set[Key]:
    """Of the texts in `held_out` the first of each class that no other text has. Values on a scale are no classes:
    where that would take half of the texts, none."""
    rows = [(y, key) for classes, key in zip(examples.classes(), keys, strict=False) for y in classes]
    trained = {label for label, key in rows if key not in held_out}
    needed = {label: key for label, key in reversed(rows) if label not in trained}
    return set(needed.values()) if 2 * len(needed) <= len(held_out) else set()


class _Candidates:
    """The pairs of each query with its candidates: those of the data, or BM25's over the documents of a file."""

    def __init__(self, columns: TrainColumns) -> None:
        self.documents: list[str] | None = None
        if columns.corpus is None:
            return
        data = next(iter(read_source(columns.corpus).values()))
        self.name = _documents_of(data.features, columns.corpus_column, columns.corpus)
        texts = (str(text) for text in data[self.name] if text is not None)
        self.documents = [text for text in dict.fromkeys(texts) if text.strip()]
        if not self.documents:
            raise ValueError(f"no row of {columns.corpus} has a text in column {self.name!r}.")
        self.count = columns.candidates or 100

    def __call__(self, queries: TextDataset, source: str) -> TextDataset:
        """Of a corpus the pairs of each query, each text once, best first; without labels."""
        if self.documents is None:
            if queries.pairs is None:
                raise ValueError(
                    f"ranking takes pairs of a query and a document, and {source} has one text per row: name the "
                    "documents with --text-pair-column, or a file of documents, in which candidates are looked for, "
                    "with --corpus."
                )
            return queries
        if queries.pairs is not None:
            raise ValueError(
                f"{source} has pairs already, with {queries.columns['text_pair']!r} as documents: leave out the "
                "corpus, or give a file with the queries alone."
            )
        texts = list(dict.fromkeys(queries.texts))
        found = retrieve(texts, self.documents, self.count)
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


def split_in_three(
    source: Mapping[str, TextDataset], seed: int = 0, max_train: int | None = None, max_eval: int | None = None
) -> dict[str, TextDataset]:
    """`train`, `validation` and `test` of labeled rows, with no text twice.

    Splits that the source has are kept; a validation split that it lacks is cut from its training rows, a test split
    that it lacks too (where the source has only training and validation rows, the latter become the test split, as is
    usual where test labels are hidden). Of several rows with the same text the first counts, and a text of the test
    split never trains. All three are shuffled, and the first rows taken."""
    named = _named(source)
    seen: set[Key] = set()
    parts: dict[str, TextDataset] = {}
    for split in reversed(SPLITS):
        if split in named:
            rows = {key: i for i, key in reversed([*enumerate(named[split].keys())]) if key not in seen}
            seen.update(rows)
            parts[split] = named[split].select(sorted(rows.values()))
    total, left = (sum(map(len, rows.values())) for rows in (named, parts))
    if left < total:
        warnings.warn(f"{total - left} of {total} rows are left out: their texts are there twice.", stacklevel=2)
    rng = random.Random(seed)
    shuffled = {split: part.select(rng.sample(range(len(part)), len(part))) for split, part in parts.items()}
    for split in ("test", "validation"):
        if split not in shuffled:
            count = max(1, round(_EVAL_FRACTION * len(parts["train"])))
            count = count if max_eval is None else min(count, max_eval)
            cut, rest = shuffled["train"], range(len(shuffled["train"]))
            shuffled[split], shuffled["train"] = cut.select(rest[:count]), cut.select(rest[count:])
    limits = {"train": max_train, "validation": max_eval, "test": max_eval}
    for split in SPLITS:
        if not len(shuffled[split]):
            raise ValueError(
                f"there are too few different texts for a {split} split: {sum(map(len, parts.values()))} in all."
            )
    return {split: shuffled[split].select(range(len(shuffled[split]))[: limits[split]]) for split in SPLITS}


def _named(source: Mapping[str, TextDataset]) -> dict[str, TextDataset]:
    """The source's splits under our names, of several validation splits the first."""
    if len(source) == 1:
        return {"train": next(iter(source.values()))}
    starts: dict[str, str | tuple[str, ...]] = {"train": "train", "validation": _VALIDATION, "test": "test"}
    found = {
        name: next((part for split, part in source.items() if split.startswith(start)), None)
        for name, start in starts.items()
    }
    if found["train"] is None:
        raise ValueError(f"the data set has no training split, only {', '.join(source)}.")
    if found["test"] is None:
        found["test"], found["validation"] = found["validation"], None
    return {name: part for name, part in found.items() if part is not None}
