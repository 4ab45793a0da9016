"""`TextRows`: texts, or pairs of texts, with raw labels where there are any, from a file or a Hub data set."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from badge_peft.data.columns import LABEL_NAMES, TEXT_NAMES, find_column
from badge_peft.data.load import read_source
from badge_peft.workflows.settings import Columns

_TRAINING = ("train",)
_EVALUATION = ("test", "validation", "dev", "valid", "train")


@dataclass
class TextRows:
    """Rows of a data set, all columns under the same names.

    Args:
        texts: One per row.
        pairs: The second texts; None where each row has one text.
        labels: As the data has them, None in a row without one; None where no row has one.
        class_names: Names behind numbers, where the data set knows them (`ClassLabel`).
        columns: `text`, `text_pair` and `label`: what they are called in the data.
        split: Which split was read.
        dropped: Rows left out because their text is missing.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    class_names: list[str] | None = None
    columns: dict[str, str | None] = field(default_factory=dict)
    split: str = "train"
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Sequence[int]) -> TextRows:
        """The rows `index`, in this order."""

        def pick(values: list[Any] | None) -> Any:
            return None if values is None else [values[i] for i in index]

        labels = pick(self.labels)
        if labels is not None and all(label is None for label in labels):
            labels = None
        return TextRows(pick(self.texts), pick(self.pairs), labels, self.class_names, self.columns, self.split)

    def key(self, i: int) -> tuple[str, str]:
        """Two rows are the same when their texts differ in case and white space at most."""
        pair = self.pairs[i] if self.pairs is not None else ""
        return " ".join(self.texts[i].split()).casefold(), " ".join(pair.split()).casefold()


def read_rows(
    source: str | Path,
    columns: Columns = Columns(),
    training: bool = False,
    usual: Mapping[str, str | None] | None = None,
) -> TextRows:
    """Reads the rows that have a text.

    Args:
        source: A csv, tsv, json, jsonl, parquet or txt file (a text per line), a folder of such, or a Hub data set.
        columns: What is read of it. A text column that is not named is found by its usual names, a label column is the
            first usual name (`label`, `category`, ...) that the data has.
        training: Which split is read where none is named: `train`, else `test`, `validation` or what there is.
        usual: `TextRows.columns` of the rows that the adapter was trained on: a column that is not named is the one
            that has this name, where there is one.

    Raises:
        FileNotFoundError: `source` looks like a path and there is no such file.
        ValueError: it cannot be read, or lacks a column, a split or any text; the message says what there is.
    """
    label_column = columns.label_column
    if columns.unlabelled and label_column is not None:
        raise ValueError(f"label_column={label_column!r} is not allowed with unlabelled=True: leave one of them out.")
    splits = _read(source, columns.dataset_config)
    name = _choose_split(splits, columns.split, _TRAINING if training else _EVALUATION, source)
    data = splits[name]
    known = {key: column for key, column in (usual or {}).items() if column in data.features}
    label_column = label_column or known.get("label")
    text = find_column(data.features, columns.text_column or known.get("text"), TEXT_NAMES, "text", taken=label_column)
    pair = pair_column(list(data.features), columns.text_pair_column, usual)
    label = None if columns.unlabelled else _label_column(data.features, label_column, taken=(text, pair))
    texts, pairs = data[text][:], data[pair][:] if pair else None
    keep = [i for i, x in enumerate(texts) if _has_text(x) and (pairs is None or _has_text(pairs[i]))]
    if not keep:
        raise ValueError(f"no row of {source} has a text in column {text!r}.")
    raw = None
    if label is not None:
        values = data[label][:]
        raw = [_clean_label(values[i]) for i in keep]
    if raw is not None and all(value is None for value in raw):
        raw = label = None
    feature = data.features[label] if label else None
    return TextRows(
        [str(texts[i]) for i in keep],
        [str(pairs[i]) for i in keep] if pairs is not None else None,
        raw,
        list(feature.names) if isinstance(feature, ClassLabel) else None,
        {"text": text, "text_pair": pair, "label": label},
        name,
        len(texts) - len(keep),
    )


def pair_column(columns: Sequence[str], given: str | None, usual: Mapping[str, str | None] | None) -> str | None:
    """The column of the second texts; None where each row has one text.

    Args:
        columns: Of the data.
        given: The user's word.
        usual: As for `read_rows`.

    Raises:
        ValueError: there is no such column, or none is named and the adapter was trained on pairs.
    """
    recorded = (usual or {}).get("text_pair")
    wanted = given or recorded
    if wanted is not None and wanted not in columns:
        why = "" if given else "this adapter was trained on pairs of texts, and "
        raise ValueError(
            f"{why}there is no text-pair column {wanted!r}. Say which with --text-pair-column: the columns are "
            f"{', '.join(columns)}."
        )
    return wanted


def hold_out(rows: TextRows, share: float, seed: int) -> tuple[TextRows, TextRows]:
    """Training rows and evaluation rows, with no text in both.

    Args:
        rows: To split.
        share: Of the evaluation rows, in (0, 1).
        seed: The same seed gives the same split.

    Raises:
        ValueError: too few different texts.
    """
    keys = list(dict.fromkeys(rows.key(i) for i in range(len(rows))))
    random.Random(seed).shuffle(keys)
    count = max(1, round(share * len(keys)))
    if len(keys) - count < 1:
        raise ValueError(
            f"there are too few different texts to hold some out: {len(keys)}. Give more, or a file of their own for "
            "the calibration with --eval-data."
        )
    held = set(keys[:count])
    parts: tuple[list[int], list[int]] = ([], [])
    for i in range(len(rows)):
        parts[rows.key(i) in held].append(i)
    return rows.select(parts[0]), rows.select(parts[1])


def without(rows: TextRows, others: TextRows) -> TextRows:
    """The rows whose text is not in `others`."""
    known = {others.key(i) for i in range(len(others))}
    return rows.select([i for i in range(len(rows)) if rows.key(i) not in known])


def _read(source: str | Path, dataset_config: str | None) -> DatasetDict:
    path = Path(source)
    if path.suffix.lower() != ".txt":
        return read_source(source, dataset_config)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}.") from error
    return DatasetDict(train=Dataset.from_dict({"text": lines}, features=Features({"text": Value("string")})))


def _choose_split(splits: DatasetDict, wanted: str | None, usual: tuple[str, ...], source: Any) -> str:
    names = list(splits)
    if wanted is not None:
        if wanted not in splits:
            raise ValueError(f"{source} has no split {wanted!r}: it has {', '.join(names)}.")
        return wanted
    for name in usual:
        if name in splits:
            return name
    if len(names) == 1:
        return names[0]
    raise ValueError(f"{source} has several splits: say which with --split: {', '.join(names)}.")


def _label_column(features: Any, given: str | None, taken: tuple[str | None, ...]) -> str | None:
    if given is not None:
        return find_column(features, given, (), "label")
    by_lower = {column.lower(): column for column in features if column not in taken}
    return next((by_lower[name] for name in LABEL_NAMES if name in by_lower), None)


def _has_text(value: Any) -> bool:
    return value is not None and bool(str(value).strip())


def _clean_label(value: Any) -> Any:
    """None for a missing label: empty, not a number, or -1, which stands for a hidden label on the Hub."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return None if value in ("", -1) else value
