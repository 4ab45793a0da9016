"""The rows of a csv file, one at a time; what could be misread is refused."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import count, zip_longest
from typing import Any, TextIO

_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")
_FRACTION = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_TRUTH = re.compile("true|false|True|False|TRUE|FALSE")


def open_rows(file: TextIO, tabs: bool = False) -> tuple[str, Iterator[dict[str, Any]]]:
    """What stands between columns, and the rows by the names of these: of two columns `text` the second is `text.1`,
    as pandas has it. Blank lines are passed over, and values that are missing at the end of a row are None.

    Args:
        file: Opened with `newline=""`.
        tabs: Whether the columns are known to stand between tabs.

    Raises:
        ValueError: while rows are read, a row with more values than there are columns, or a quote without an end.
        csv.Error: while rows are read, what is no csv file.
    """
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
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        yield header
        yield from file
        ended = True

    reader = csv.reader(lines(), delimiter=delimiter)
    names = _unique(next(reader, []))
    for number, row in enumerate(filter(None, reader), start=1):
        if ended:  # the reader has asked for more in the middle of a value
            raise ValueError(f'row {number} begins a quote (") that does not end: close it, or write "" for a quote.')
        if len(row) > len(names):  # a text would lose what is behind its comma
            raise ValueError(
                f"row {number} has {len(row)} values, and the columns are {', '.join(names)}: put a text with "
                f"{delimiter!r} in it in quotes."
            )
        yield dict(zip_longest(names, row))


def _unique(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        copies = (f"{name}.{i}" for i in count(1))
        found.append(name if name not in found else next(copy for copy in copies if copy not in found))
    return found
