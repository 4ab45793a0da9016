"""`load_text_dataset`: labelled texts from a local file, a folder or the Hub, with the same columns whatever they are
called there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError

from badge_peft.data.columns import LABEL_NAMES, TEXT_NAMES, find_column

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_MOST_LABELS = 1000


def load_text_dataset(
    source: str | Path,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    name: str | None = None,
) -> DatasetDict:
    """Reads labelled texts as `text` (string) and `label` (a `ClassLabel`), one entry per split that the source has.

    Rows without a text or a label (missing, blank, or -1, which stands for a hidden label on the Hub) are left out,
    and so are splits in which no row is left.

    Args:
        source: A csv, tsv, json, jsonl or parquet file (also compressed, as `.csv.bz2`), a folder of such files
            (`train.csv`, `test.csv`), or the name of a Hub data set.
        text_column: None finds it: a usual name (`text`, `sentence`, ...), or the only column of texts.
        label_column: None finds it by its usual names (`label`, `category`, ...).
        labels: Keep the rows with these labels and number the labels in this order. None takes all: in the order of
            the source's `ClassLabel` or of the numbers, strings by the alphabet.
        name: Configuration of a Hub data set.

    Raises:
        FileNotFoundError: `source` looks like a path and there is no such file.
        ValueError: a format or column that cannot be read; the message says which there are.
    """
    splits = read_source(source, name)
    columns = next(iter(splits.values())).features
    text = find_column(columns, text_column, TEXT_NAMES, "text", taken=label_column)
    label = find_column(columns, label_column, LABEL_NAMES, "label", taken=text)
    rows = {split: _clean(data[text][:], data[label][:]) for split, data in splits.items()}
    rows = {split: kept for split, kept in rows.items() if kept}
    if not rows:
        raise ValueError(f"no row of {source} has both a text ({text!r}) and a label ({label!r}).")
    names, numbers = _label_names(columns[label], [y for kept in rows.values() for _, y in kept], label, labels)
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    found = {}
    for split, kept in rows.items():
        pairs = [(x, numbers[y]) for x, y in kept if y in numbers]
        if pairs:
            found[split] = Dataset.from_dict(
                {"text": [x for x, _ in pairs], "label": [y for _, y in pairs]}, features=features
            )
    if not found:
        raise ValueError(f"no row of {source} has one of the labels {list(labels or [])}; it has {sorted(names)}.")
    return DatasetDict(found)


def read_source(source: str | Path, name: str | None = None) -> DatasetDict:
    """The data set as the source has it, every column and every split.

    Raises:
        FileNotFoundError: `source` looks like a path and there is no such file.
        ValueError: a file of a format that is not known, that does not hold what its name says, or that has no rows.
    """
    path = Path(source)
    if path.is_dir():
        return _read_local(str(path))
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    suffix = suffixes[-1].lower() if suffixes else ""
    if path.is_file():
        if suffix not in FORMATS:
            raise ValueError(f"{path} is in no format that can be read: its name must end in {', '.join(FORMATS)}.")
        options: dict[str, Any] = {}
        if FORMATS[suffix] == "csv":  # "None", "NA" and "null" are texts, too
            options = {"keep_default_na": False, "na_values": [""], "sep": "\t" if suffix == ".tsv" else ","}
        return _read_local(FORMATS[suffix], data_files=str(path), **options)
    if suffix in FORMATS or path.is_absolute():
        raise FileNotFoundError(f"there is no file {path}.")
    return load_dataset(str(source), name)


def _read_local(*args: Any, **options: Any) -> DatasetDict:
    """Reads files straight into memory: the user's cache is left alone, and a changed file is never missed."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            splits = load_dataset(*args, cache_dir=cache, **options)
            return DatasetDict({k: Dataset.from_dict(v.to_dict(), features=v.features) for k, v in splits.items()})
    except (DatasetGenerationError, ValueError) as error:
        path = options.get("data_files", args[0])
        raise ValueError(f"{path} cannot be read, or has no rows: {error.__cause__ or error}") from error
    finally:
        if shown:
            enable_progress_bars()


def _clean(texts: Any, labels: Any) -> list[tuple[str, Any]]:
    """Rows that have both; whole floats (a csv column with holes) become whole numbers."""
    rows = []
    for text, label in zip(texts, labels, strict=True):
        if isinstance(label, float):
            label = None if math.isnan(label) else int(label) if label.is_integer() else label
        if text is None or not str(text).strip() or label is None or label == "" or label == -1:
            continue
        rows.append((str(text), label))
    return rows


def _label_names(
    feature: Any, values: list[Any], column: str, wanted: Sequence[str] | None
) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and the number of each raw value."""
    if isinstance(feature, ClassLabel):
        raw: list[Any] = list(range(feature.num_classes))
        names = list(feature.names)
    else:
        kinds = {type(value) for value in values}
        if not kinds <= {str, int, bool}:
            raise ValueError(
                f"the label column {column!r} holds {', '.join(sorted(k.__name__ for k in kinds))} values, but labels "
                "must be strings or whole numbers. Name another with label_column."
            )
        raw = sorted(set(values), key=lambda value: (str(type(value)), value))
        names = [str(value) for value in raw]
    if wanted is not None:
        missing = [label for label in wanted if label not in names]
        if missing:
            raise ValueError(f"labels={list(wanted)} names {missing[0]!r}, but column {column!r} has {names}.")
        return list(wanted), {raw[names.index(label)]: i for i, label in enumerate(wanted)}
    if not 2 <= len(names) <= _MOST_LABELS:
        raise ValueError(
            f"the label column {column!r} has {len(names)} different values: a classifier needs 2 to {_MOST_LABELS}. "
            "Name another with label_column."
        )
    return names, {value: i for i, value in enumerate(raw)}
