"""Data sets with all their columns: files, each opened by its exact name, folders of them, and the Hub's."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from badge_peft.utils.files import is_local
from badge_peft.workflows.columns import QUERY_ID_NAMES

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")
_FRACTION = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_TRUTH = re.compile("true|false|True|False|TRUE|FALSE")


def read_source(source: str | Path, name: str | None = None) -> Mapping[str, Dataset]:
    """Every split of a data set, with every column; `name` is the configuration of one of the Hub."""
    path = Path(source)
    suffix = suffix_of(source)
    if path.is_dir():
        return _read_local(path)
    if not path.is_file():
        if is_local(source) or suffix in FORMATS:
            raise FileNotFoundError(f"there is no file {path}.")
        return load_dataset(str(source), name)
    if suffix not in FORMATS:
        raise ValueError(f"{path} has an unsupported format: its name must end in {', '.join(FORMATS)}.")
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
    return Dataset.from_dict(
        # an id such as 1.10 is no number either
        {name: values if name.lower() in QUERY_ID_NAMES else numbers_of(values) for name, values in columns.items()}
    )


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


def open_rows(file: TextIO, tabs: bool = False) -> tuple[str, Iterator[dict[str, Any]]]:
    """What stands between columns, and the rows by the names of these: of two columns `text` the second is `text.1`,
    as pandas has it. Blank lines are passed over, and values that are missing at the end of a row are None."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # more than 131,072 characters
    header = next((line for line in file if line.strip("\r\n")), "")
    delimiter = delimiter_of(header, tabs)
    return delimiter, _rows(header, file, delimiter)


def delimiter_of(header: str, tabs: bool = False) -> str:
    """What stands between the columns of a csv file with this first line: a comma, but for a header that has none and
    has semicolons or tabs."""
    if tabs:
        return "\t"
    plain = re.sub(r'"[^"]*"', "", header)
    return next((d for d in (",", ";", "\t") if d in plain), ",")


def numbers_of(values: list[str | None]) -> list[Any]:
    """The values of a column as whole numbers, fractions, or true and false, where all are written so; a code such as
    007 is no number."""
    given = [value for value in values if value is not None]
    kinds: Any = ((_WHOLE, int), (_FRACTION, float), (_TRUTH, lambda value: value.lower() == "true"))
    for pattern, read in kinds if given else ():
        if all(map(pattern.fullmatch, given)):
            return [None if value is None else read(value) for value in values]
    return list(values)


def _rows(header: str, file: TextIO, delimiter: str) -> Iterator[dict[str, Any]]:
    # strict: else a text that merely begins with a quote would lose it, or take in the rows up to the next one
    reader = csv.reader(chain([header], file), delimiter=delimiter, strict=True)
    number = 0
    try:
        names = _unique(next(reader, []))
        for number, row in enumerate(filter(None, reader), start=1):
            if len(row) > len(names):  # a text would lose what is behind its comma
                raise ValueError(
                    f"row {number} has {len(row)} values, and the columns are {', '.join(names)}: put a text with "
                    f"{delimiter!r} in it in quotes."
                )
            yield dict(zip_longest(names, row))
    except csv.Error as error:
        raise ValueError(
            f'row {number + 1} cannot be read: {error}. A value that begins with a quote (") ends with one, and has '
            '"" for each of its own.'
        ) from error


def _unique(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        copies = (f"{name}.{i}" for i in count(1))
        found.append(name if name not in found else next(copy for copy in copies if copy not in found))
    return found
