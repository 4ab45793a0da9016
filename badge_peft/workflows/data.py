"""`TextDataset`: texts, or pairs of texts, with raw labels where there are any, from a file or a Hub data set; also
texts with a tag for each token."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from badge_peft.utils.texts import text_in
from badge_peft.workflows.columns import (
    Names,
    check_entities,
    check_tags,
    find_columns,
    find_token_columns,
    kinds_of,
    unused_texts,
)
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.sources import read_source

_EVALUATION = ("test", "validation", "dev", "valid", "train")  # which split is read, the first that there is


@dataclass
class TextDataset:
    """Rows of a data set, all columns under the same names."""

    texts: list[str]  # one per row; of tokens, these with blanks in between
    pairs: list[str] | None = None  # the second texts; None where each row has one text
    # as the data has them, None in a row without one; None where no row has one. Where `tagged`, the tags of a row's
    # words, or the entities of its text: see `columns.py`
    labels: list[Any] | None = None
    class_names: list[str] | None = None  # names behind numbers, where the data set knows them (`ClassLabel`)
    columns: Names = field(default_factory=dict)  # `text`, `text_pair` and `label`: what they are called in the data
    split: str = "train"  # which split was read
    query_ids: list[Any] | None = None  # the same for the candidates of a query; None where no column says so
    numbers: Sequence[int] | None = None  # of the rows in the data, from 1 on; None: 1, 2, 3, ...
    words: list[list[str]] | None = None  # the tokens of each row, where the data has them
    tagged: bool = False  # whether labels are those of tokens

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Sequence[int]) -> TextDataset:
        """The rows `index`, in this order."""
        found = {name: getattr(self, name) for name in ("texts", "pairs", "labels", "query_ids", "words")}
        found = {name: None if rows is None else [rows[i] for i in index] for name, rows in found.items()}
        if all(label is None for label in found["labels"] or ()):
            found["labels"] = None
        return replace(self, **found, numbers=[self.number(i) for i in index])

    def number(self, i: int) -> int:
        """What row `i` is called in the data, in which rows count from 1."""
        return i + 1 if self.numbers is None else self.numbers[i]

    def labeled(self) -> TextDataset:
        """The rows that have a label."""
        return self.select([i for i, label in enumerate(self.labels or []) if label is not None])

    def queries(self) -> list[str]:
        """An id of each row's query: what its column says, else its text."""
        ids = self.query_ids or [None] * len(self)
        return [text if query in (None, "") else str(query) for text, query in zip(self.texts, ids, strict=True)]

    def rows_of_queries(self) -> dict[str, list[int]]:
        """The rows of each query, in the order of the first ones."""
        found: dict[str, list[int]] = {}
        for i, query in enumerate(self.queries()):
            found.setdefault(query, []).append(i)
        return found

    def classes(self) -> list[set[str]]:
        """Of each row what its label is an example of: itself, or the kinds of its entities."""
        if self.tagged:
            return [kinds_of(label or []) for label in self.labels or []]
        return [set() if label is None else {str(label)} for label in self.labels or []]

    def keys(self) -> list[tuple[str, ...]]:
        """One per row. Two rows are the same when their texts differ in case and white space at most."""
        columns = [self.texts] if self.pairs is None else [self.texts, self.pairs]
        return [tuple(" ".join(text.split()).casefold() for text in row) for row in zip(*columns, strict=True)]


def read_examples(
    source: str | Path,
    columns: Columns = Columns(),
    training: bool = False,
    recorded: Mapping[str, str | None] | None = None,
) -> TextDataset:
    """Reads the rows of one split that have a text, as `pick_split` does, of a csv, tsv, json, jsonl, parquet or txt
    file (a text per line), a folder of such, or a Hub data set."""
    if columns.unlabeled and columns.label_column is not None:
        raise ValueError(
            f"label_column={columns.label_column!r} is not allowed with unlabeled=True: leave one of them out."
        )
    return pick_split(read_source(source, columns.dataset_config), source, columns, training, recorded)


def pick_split(
    splits: Mapping[str, Dataset],
    source: str | Path,
    columns: Columns,
    training: bool = False,
    recorded: Mapping[str, str | None] | None = None,
) -> TextDataset:
    """The rows of the split that is asked for, else in `training` of `train`, else of `test`, `validation` or what
    there is. A column that is not named is the one that has its name in `recorded`, those of the adapter's training
    data, else the first that has a usual name."""
    name = _choose_split(splits, columns.split, ("train",) if training else _EVALUATION, source)
    return to_examples(splits[name], name, columns, recorded, source)


def to_examples(
    data: Dataset,
    split: str,
    columns: Columns,
    recorded: Mapping[str, str | None] | None = None,
    source: str | Path = "the data",
) -> TextDataset:
    """The rows of `data` that have a text; see `read_examples`."""
    features = data.features
    strings = {name for name in features if getattr(features[name], "dtype", "") in ("string", "large_string")}
    words, spans = find_token_columns(list(features), lambda name: data[name][:], columns, recorded)
    tagged = words is not None or spans is not None
    if words is None:
        asked = replace(columns, unlabeled=True, label_column=None) if tagged else columns
        names = find_columns(list(features), asked, recorded, strings.__contains__)
    if tagged:
        label = None if columns.unlabeled else spans
        names = {"text": words or names["text"], "text_pair": None, "label": label}
    texts: list[Any] = data[names["text"]][:]
    pairs = data[names["text_pair"]][:] if names["text_pair"] else None
    rows = [i for i, row in enumerate(zip(texts, pairs or texts, strict=True)) if all(map(_has_text, row))]
    if not rows:
        raise ValueError(f"no row of {source} has a text in column {names['text']!r}.")
    kind = features[names["label"]] if names["label"] else None
    labels = data[names["label"]][:] if names["label"] else None
    if tagged and labels is not None:
        labels = _named_tags(labels, kind)
        for i in rows:
            if labels[i] is not None:
                (check_entities if words is None else check_tags)(texts[i], labels[i], i + 1)
    elif labels is not None:
        labels = _clean_labels(labels, isinstance(kind, ClassLabel))
    of_text, of_pair = names["text"], names["text_pair"]
    found = TextDataset(
        [text_in(text, of_text, i) if words is None else " ".join(text or []) for i, text in enumerate(texts, 1)],
        None if pairs is None else [text_in(pair, of_pair, i) for i, pair in enumerate(pairs, 1)],
        labels,
        None if tagged else getattr(kind, "names", None),
        names,
        split,
        data[names["query_id"]][:] if names.get("query_id") else None,
        words=texts if words is not None else None,
        tagged=tagged and kind is not None,
    ).select(rows)
    for note in _notes(found, len(texts), [] if tagged else unused_texts(data, strings, names)):
        warnings.warn(f"{source}, {split}: {note}", stacklevel=2)
    if found.labels or tagged:
        return found
    return replace(found, class_names=None, columns={**names, "label": None})


def _named_tags(values: list[Any], kind: Any) -> list[Any]:
    """Tags or entities of each row; numbers that the data set has names for by these."""
    names = getattr(getattr(kind, "feature", None), "names", None)
    if names is None:
        return values
    hidden = [row is None or any(i is None or i < 0 for i in row) for row in values]  # -1, as in a test split
    return [None if hides else [names[i] for i in row] for hides, row in zip(hidden, values, strict=True)]


def _notes(found: TextDataset, total: int, unused: list[str]) -> Iterator[str]:
    """What a user would want to know of rows and columns that are not used."""
    if len(found) < total:
        yield f"{total - len(found)} of {total} rows have no text and are left out."
    hidden = sum(label is None for label in found.labels or [])
    if found.columns["label"] and found.labels is None:
        yield f"no row has a label in column {found.columns['label']!r}: they are missing or hidden."
    if hidden:
        yield f"{hidden} of {len(found)} rows have no label, and are left out where labels are needed."
    if unused:
        remedy = "" if found.pairs else f" For pairs of texts, add --text-pair-column {unused[0]}."
        yield f"not used, though it seems to hold texts: column {', '.join(map(repr, unused))}.{remedy}"


def _choose_split(splits: Mapping[str, Any], wanted: str | None, usual: tuple[str, ...], source: Any) -> str:
    names = list(splits)
    if wanted is not None and wanted not in names:
        raise ValueError(f"{source} has no split {wanted!r}: it has {', '.join(names)}.")
    found = wanted or next((name for name in usual if name in names), names[0] if len(names) == 1 else None)
    if found is None:
        raise ValueError(f"{source} has several splits: say which with --split: {', '.join(names)}.")
    return found


def _has_text(value: Any) -> bool:
    """Of a list of tokens, one of them."""
    return any(map(_has_text, value)) if isinstance(value, list) else value is not None and bool(str(value).strip())


def _clean_labels(values: list[Any], are_classes: bool) -> list[Any]:
    """None for a missing label: empty or not a number; and -1, which stands for a hidden label of a `ClassLabel`, and
    where no row has another."""
    if all(value is None or (isinstance(value, list) and len(value) == 1) for value in values):
        values = [value and value[0] for value in values]
    found = [_clean_label(value) for value in values]
    hides = are_classes or all(label in (None, -1) for label in found)
    return [None if hides and label == -1 else label for label in found]


def _clean_label(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    return None if value == "" else value
