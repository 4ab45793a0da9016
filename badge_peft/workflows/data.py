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

from badge_peft.workflows.columns import Names, find_columns, unused_texts
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.sources import read_source
from badge_peft.workflows.token_rows import (
    check_entities,
    check_tags,
    find_token_columns,
    kinds_of,
    token_columns,
)

_EVALUATION = ("test", "validation", "dev", "valid", "train")  # which split is read, the first that there is


@dataclass
class TextDataset:
    """Rows of a data set, all columns under the same names.

    Args:
        texts: One per row; of tokens, these with blanks in between.
        pairs: The second texts; None where each row has one text.
        labels: As the data has them, None in a row without one; None where no row has one. Where `tagged`, the tags of
            a row's words, or the entities of its text: see `token_rows.py`.
        class_names: Names behind numbers, where the data set knows them (`ClassLabel`).
        columns: `text`, `text_pair` and `label`: what they are called in the data.
        split: Which split was read.
        query_ids: The same for the candidates of a query; None where no column says so.
        numbers: Of the rows in the data, from 1 on; None where they are 1, 2, 3, ...
        words: The tokens of each row, where the data has them.
        tagged: Whether labels are those of tokens.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    class_names: list[str] | None = None
    columns: Names = field(default_factory=dict)
    split: str = "train"
    query_ids: list[Any] | None = None
    numbers: Sequence[int] | None = None
    words: list[list[str]] | None = None
    tagged: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Sequence[int]) -> TextDataset:
        """The rows `index`, in this order."""
        labels = None if self.labels is None else [self.labels[i] for i in index]
        return replace(
            self,
            texts=[self.texts[i] for i in index],
            pairs=None if self.pairs is None else [self.pairs[i] for i in index],
            labels=labels if labels and any(label is not None for label in labels) else None,
            query_ids=None if self.query_ids is None else [self.query_ids[i] for i in index],
            numbers=[self.number(i) for i in index],
            words=None if self.words is None else [self.words[i] for i in index],
        )

    def number(self, i: int) -> int:
        """What row `i` is called in the data, in which rows count from 1."""
        return i + 1 if self.numbers is None else self.numbers[i]

    def labeled(self) -> TextDataset:
        """The rows that have a label."""
        return self.select([i for i, label in enumerate(self.labels or []) if label is not None])

    def queries(self) -> list[str]:
        """An id of each row's query: what its column says, else its text."""
        ids = self.query_ids or [None] * len(self)
        return [text if query is None else str(query) for text, query in zip(self.texts, ids, strict=True)]

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
    """Reads the rows of one split that have a text.

    Args:
        source: A csv, tsv, json, jsonl, parquet or txt file (a text per line), a folder of such, or a Hub data set.
        columns: What is read of it. A text column that is not named is found by its usual names, a label column is the
            first usual name (`label`, `category`, ...) that the data has.
        training: Which split is read where none is named: `train`, else `test`, `validation` or what there is.
        recorded: `TextDataset.columns` of the adapter's training data: a column that is not named is the one that has
            this name, where there is one.

    Raises:
        FileNotFoundError: `source` looks like a path and there is no such file.
        ValueError: it cannot be read, or lacks a column, a split or any text; the message says what there is.
    """
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
    """As `read_examples`, of splits that have been read."""
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
    words, spans = find_token_columns(list(features), lambda name: data[name][:], columns, recorded)
    strings = {name for name in features if getattr(features[name], "dtype", "") in ("string", "large_string")}
    if words is not None or spans is not None:
        if words is None:
            names = find_columns(list(features), replace(columns, unlabeled=True, label_column=None), recorded)
            names = token_columns(None, names["text"], spans)
        else:
            names = token_columns(words, None, spans)
        return _tagged(data, split, names, words is not None, columns.unlabeled, source)
    names = find_columns(list(features), columns, recorded, strings.__contains__)
    texts: list[Any] = data[names["text"]][:]
    pairs, labels = (data[names[key]][:] if names[key] else None for key in ("text_pair", "label"))
    rows = [i for i, row in enumerate(zip(texts, pairs or texts, strict=True)) if all(map(_has_text, row))]
    if not rows:
        raise ValueError(f"no row of {source} has a text in column {names['text']!r}.")
    label = features[names["label"]] if names["label"] else None
    found = TextDataset(
        [str(text) for text in texts],
        None if pairs is None else [str(pair) for pair in pairs],
        None if labels is None else _clean_labels(labels, isinstance(label, ClassLabel)),
        getattr(label, "names", None),
        names,
        split,
        data[names["query_id"]][:] if names.get("query_id") else None,
    ).select(rows)
    unused = unused_texts(data, strings, names)
    for note in _notes(found, len(texts), unused):
        warnings.warn(f"{source}, {split}: {note}", stacklevel=2)
    return found if found.labels else replace(found, class_names=None, columns={**names, "label": None})


def _tagged(
    data: Dataset, split: str, names: Names, are_words: bool, unlabeled: bool, source: str | Path
) -> TextDataset:
    """The rows of `data` with their tags, or with the entities of their text, checked."""
    texts = data[names["text"]][:]
    column = None if unlabeled else names["label"]
    labels: list[Any] = [None] * len(texts) if column is None else _named_tags(data, column)
    rows = [i for i, text in enumerate(texts) if (any(map(_has_text, text or [])) if are_words else _has_text(text))]
    if not rows:
        raise ValueError(f"no row of {source} has a text in column {names['text']!r}.")
    for i in rows:
        if labels[i] is not None:
            (check_tags if are_words else check_entities)(texts[i], labels[i], i + 1)
    found = TextDataset(
        [" ".join(text or []) if are_words else str(text) for text in texts],
        labels=labels,
        columns={**names, "label": column},
        split=split,
        words=texts if are_words else None,
        tagged=column is not None,
    ).select(rows)
    for note in _notes(found, len(texts), []):
        warnings.warn(f"{source}, {split}: {note}", stacklevel=2)
    return found


def _named_tags(data: Dataset, column: str) -> list[Any]:
    """Tags or entities of each row; numbers that the data set has names for by these."""
    names = getattr(getattr(data.features[column], "feature", None), "names", None)
    values = data[column][:]
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
    return value is not None and bool(str(value).strip())


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
