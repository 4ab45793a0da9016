"""Data sets with all their columns: files, each opened by its exact name, folders of them, and the Hub's."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from badge_peft.utils.paths import is_local
from badge_peft.workflows.csv_rows import numbers_of, open_rows

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def read_source(source: str | Path, name: str | None = None) -> Mapping[str, Dataset]:
    """Every split of a data set, with every column; `name` is the configuration of one of the Hub.

    Raises:
        FileNotFoundError: `source` looks like a path and there is no such file.
        ValueError: a file of a format that is not known, that does not hold what its name says, or that has no rows.
    """
    path, suffix = Path(source), suffix_of(source)
    if path.is_dir():
        return _read_local(path)
    if not path.is_file():
        if is_local(source) or suffix in FORMATS:
            raise FileNotFoundError(f"there is no file {path}.")
        return load_dataset(str(source), name)
    if suffix not in FORMATS:
        raise ValueError(f"{path} is in no format that can be read: its name must end in {', '.join(FORMATS)}.")
    return _read_local(path, FORMATS[suffix])


def suffix_of(path: str | Path) -> str:
    """The ending that says a file's format, in lower case, before one that says how it is compressed."""
    return next((s.lower() for s in reversed(Path(path).suffixes) if s.lower() not in _COMPRESSED), "")


def open_text(path: str | Path, newline: str) -> Any:
    """A text file, compressed or not, by its exact name; a mark at its start that says UTF-8 is no part of it."""
    packed = infer_compression(str(path))
    return OpenFile(LocalFileSystem(), str(path), "rt", packed, encoding="utf-8-sig", newline=newline)


def lines_of(file: Iterable[str]) -> Iterator[str]:
    """The texts of a file with a text per line, opened with `newline="\\n"`: a line ends at \\n or \\r\\n, and nowhere
    else."""
    return (line.removesuffix("\n").removesuffix("\r") for line in file)


def _read_local(path: Path, format: str | None = None) -> dict[str, Dataset]:
    """Streams files into memory: the user's cache is left alone, and a changed file is never missed."""
    try:
        if format == "text":
            with open_text(path, "\n") as file:
                found = {"train": Dataset.from_dict({"text": list(lines_of(file))})}
        elif format == "csv":
            found = {"train": _read_csv([path])}
        else:
            with _plainly_named(path) as there:
                arguments = {"path": there} if format is None else {"path": format, "data_files": there}
                builder = load_dataset_builder(**arguments)
                if builder.name == "csv":  # a folder of them
                    files = builder.config.data_files or {}
                    found = {name: _read_csv(paths) for name, paths in files.items()}
                else:
                    streams = builder.as_streaming_dataset().items()
                    found = {name: Dataset.from_list(list(rows), features=rows.features) for name, rows in streams}
    except (DatasetGenerationError, ValueError, OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    if not all(map(len, found.values())):
        raise ValueError(f"{path} cannot be read: it has no rows.")
    return found


def _read_csv(files: Iterable[str | Path]) -> Dataset:
    """As `predict` reads them, with numbers for what is one: pandas takes "NA" and "null" for missing values."""
    columns: dict[str, list[Any]] = {}
    for path in files:
        with open_text(path, "") as file:
            for row in open_rows(file, suffix_of(path) == ".tsv")[1]:
                columns = columns or {name: [] for name in row}
                if row.keys() != columns.keys():
                    raise ValueError(f"its files have different columns: {', '.join(columns)}, and {', '.join(row)}.")
                for name, value in row.items():
                    columns[name].append(value or None)
    return Dataset.from_dict({name: numbers_of(values) for name, values in columns.items()})


@contextmanager
def _plainly_named(path: Path) -> Iterator[str]:
    """Another name of `path`, in which `load_dataset` finds no pattern: it takes [ ] * ? and :: for one."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        packed = path.suffix if path.suffix.lower() in _COMPRESSED else ""
        there = Path(folder, "data" if path.is_dir() else f"data{suffix_of(path)}{packed}")
        if path.is_dir():
            shutil.copytree(path, there, copy_function=_link, ignore_dangling_symlinks=True)
        else:
            _link(path, there)
        yield str(there)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.symlink(os.path.abspath(source), target)
    except OSError:  # Windows asks for rights
        shutil.copyfile(source, target)
