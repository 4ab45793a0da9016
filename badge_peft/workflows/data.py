"""`TextDataset`: texts, or pairs of texts, with raw labels where there are any, from a file or a Hub data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from badge_peft.utils.paths import is_local
from badge_peft.workflows.columns import Names, find_columns
from badge_peft.workflows.settings import Columns

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_EVALUATION = ("test", "validation", "dev", "valid", "train")  # which split is read, the first that there is


@dataclass
class TextDataset:
    """Rows of a data set, all columns under the same names.

    Args:
        texts: One per row.
        pairs: The second texts; None where each row has one text.
        labels: As the data has them, None in a row without one; None where no row has one.
        class_names: Names behind numbers, where the data set knows them (`ClassLabel`).
        columns: `text`, `text_pair` and `label`: what they are called in the data.
        split: Which split was read.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    class_names: list[str] | None = None
    columns: Names = field(default_factory=dict)
    split: str = "train"

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
        )

    def labeled(self) -> TextDataset:
        """The rows that have a label."""
        return self.select([i for i, label in enumerate(self.labels or []) if label is not None])

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
    splits = read_source(source, columns.dataset_config)
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
    names = find_columns(list(features), columns, recorded, strings.__contains__)
    texts: list[Any] = data[names["text"]][:]
    pairs, labels = (data[names[key]][:] if names[key] else None for key in ("text_pair", "label"))
    rows = [i for i, row in enumerate(zip(texts, pairs or texts, strict=True)) if all(map(_has_text, row))]
    if not rows:
        raise ValueError(f"no row of {source} has a text in column {names['text']!r}.")
    class_names = getattr(features[names["label"]], "names", None) if names["label"] else None
    found = TextDataset(
        [str(text) for text in texts],
        None if pairs is None else [str(pair) for pair in pairs],
        None if labels is None else [_clean_label(label) for label in labels],
        class_names,
        names,
        split,
    ).select(rows)
    return found if found.labels else replace(found, class_names=None, columns={**names, "label": None})


def read_source(source: str | Path, name: str | None = None) -> Mapping[str, Dataset]:
    """Every split of a data set, with every column; `name` is the configuration of one of the Hub.

    Raises:
        FileNotFoundError: `source` looks like a path and there is no such file.
        ValueError: a file of a format that is not known, that does not hold what its name says, or that has no rows.
    """
    path, suffix = Path(source), suffix_of(source)
    if path.is_dir():
        return _read_local(path, str(path))
    if not path.is_file():
        if is_local(source) or suffix in FORMATS:
            raise FileNotFoundError(f"there is no file {path}.")
        return load_dataset(str(source), name)
    if suffix not in FORMATS:
        raise ValueError(f"{path} is in no format that can be read: its name must end in {', '.join(FORMATS)}.")
    options: dict[str, Any] = {}
    if FORMATS[suffix] == "csv":  # "None", "NA" and "null" are texts, too
        options = {"keep_default_na": False, "na_values": [""], "sep": "\t" if suffix == ".tsv" else ","}
    return _read_local(path, FORMATS[suffix], data_files=str(path), **options)


def suffix_of(path: str | Path) -> str:
    """The ending that says a file's format, in lower case, before one that says how it is compressed."""
    return next((s.lower() for s in reversed(Path(path).suffixes) if s.lower() not in _COMPRESSED), "")


def _read_local(path: Path, *args: Any, **options: Any) -> dict[str, Dataset]:
    """Streams files into memory: the user's cache is left alone, and a changed file is never missed."""
    try:
        splits = load_dataset(*args, streaming=True, **options)
        found = {name: Dataset.from_list(list(rows), features=rows.features) for name, rows in splits.items()}
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    if not all(map(len, found.values())):
        raise ValueError(f"{path} cannot be read: it has no rows.")
    return found


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


def _clean_label(value: Any) -> Any:
    """None for a missing label: empty, not a number, or -1, which stands for a hidden label on the Hub."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    return None if value in ("", -1) else value
