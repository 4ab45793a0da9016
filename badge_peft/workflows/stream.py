"""Texts to answer, one at a time or in chunks: from files or stdin, never all of it in memory."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from pyarrow import ArrowInvalid
from pyarrow.parquet import ParquetFile

from badge_peft.utils.checks import check_choice
from badge_peft.utils.texts import text_in, whole
from badge_peft.workflows.columns import find_columns, find_words
from badge_peft.workflows.settings import TextColumns
from badge_peft.workflows.sources import lines_of, open_rows, open_text, suffix_of

FORMATS = ("text", "csv", "tsv", "jsonl", "parquet")
_CHUNK = 1024  # rows of a parquet file in memory at once
#: A text, or where tokens are asked for a list of these; its second text; where asked, what its query is called.
Pair = tuple[Any, ...]


def read_texts(
    source: str = "-",
    format: str | None = None,
    columns: TextColumns = TextColumns(),
    recorded: Mapping[str, str | None] | None = None,
    tokens: bool = False,
    by_query: bool = False,
) -> Iterator[Pair]:
    """Yields each text with its second text (or None), in the order of the source.

    Args:
        source: A file; `-` is stdin.
        format: `text` (a text per line), `csv`, `tsv`, `jsonl` or `parquet`; None goes by the file's name.
        columns: Where the texts are; a text column that is not named is found by its usual names.
        recorded: As for `read_examples`.
        tokens: Whether a row may have a list of tokens in the place of its text (in jsonl and parquet).
        by_query: Also yield what each row's query is called: by its column, else the query's text.
    """
    if format is None:
        suffix = suffix_of(source).lstrip(".")
        format = "text" if suffix in ("", "txt") else suffix
        if format not in FORMATS:
            raise ValueError(f"{source} has a format that cannot be read line by line: name one with --format.")
    check_choice("format", format, FORMATS)
    if source != "-" and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}.")
    if format == "parquet" and source == "-":
        raise ValueError("format='parquet' is not allowed for stdin: name a file.")
    if format == "text" and (columns.text_pair_column or (recorded or {}).get("text_pair")):
        raise ValueError("pairs of texts need named columns: give a csv, tsv, jsonl or parquet file (--format).")
    if format == "text":
        return ((row["text"], None) for row in _rows(source, format))
    return _pairs(_rows(source, format), columns, recorded, tokens, by_query)


def _pairs(
    rows: Iterable[Mapping[str, Any]],
    columns: TextColumns,
    recorded: Mapping[str, str | None] | None,
    tokens: bool,
    by_query: bool,
) -> Iterator[Pair]:
    text = pair = query = None
    for number, row in enumerate(rows, start=1):
        if text is None:
            words = find_words(row, columns, recorded)
            if words is not None and not tokens and not any(isinstance(value, str) for value in row.values()):
                _words(row[words], number, words, tokens)
            text = words if tokens else None
            if text is None:
                names = find_columns(list(row), columns, recorded)
                text = names["text"]
                pair = names["text_pair"]
                query = names.get("query_id")
        for column in (text, pair):
            if column is not None and row.get(column) is None:
                raise ValueError(f"row {number} has no value in column {column!r}.")
        value = row[str(text)]
        if isinstance(value, list):
            yield _words(value, number, str(text), tokens), None
            continue
        found = whole(text_in(value, text, number)), None if pair is None else whole(text_in(row[pair], pair, number))
        id_ = None if query is None else row.get(query)
        yield (*found, found[0] if id_ in (None, "") else str(id_)) if by_query else found


def _words(value: list[Any], number: int, column: str, tokens: bool) -> list[str]:
    if not tokens:
        raise ValueError(
            f"row {number} has a list in column {column!r}, and the adapter classifies texts: give texts, or "
            "an adapter for tokens."
        )
    if not all(isinstance(word, str) for word in value):
        raise ValueError(f"row {number} has no list of tokens in column {column!r}: {str(value)[:80]}.")
    return [whole(word) for word in value]


def _rows(source: str, format: str) -> Iterator[dict[str, Any]]:
    try:
        if format == "parquet":
            with ParquetFile(source) as table:
                for batch in table.iter_batches(_CHUNK):
                    yield from batch.to_pylist()
            return
        newline = "\n" if format == "text" else ""
        with _standard_input(newline) if source == "-" else open_text(source, newline) as file:
            if format == "text":
                yield from ({"text": line} for line in lines_of(file))
            elif format == "jsonl":
                yield from _json_lines(file)
            else:
                yield from open_rows(file, format == "tsv")[1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not in UTF-8: {error}.") from error
    except (ArrowInvalid, csv.Error) as error:
        raise ValueError(f"{source} cannot be read as {format}: {error}.") from error


def _standard_input(newline: str) -> AbstractContextManager[TextIO]:
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(newline=newline)
    return nullcontext(sys.stdin)


def _json_lines(file: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number} is no JSON object: each line must be one, such as {{"text": "..."}}.')
        yield row


def queries_of(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """The candidates of one query after another. They follow one another in the rows, of which no more than those of a
    query are in memory."""
    seen: set[str] = set()
    number = 1
    for query, group in groupby(pairs, key=lambda pair: pair[2] if len(pair) > 2 else pair[0]):
        rows = list(group)
        if query in seen:
            raise ValueError(
                f"row {number} is of query {query[:80]!r} again, after rows of others: all candidates of a query must "
                "follow one another to be ranked together. Sort the rows by their query, or, where two queries have "
                "the same text, give each an id (--query-id-column)."
            )
        seen.add(query)
        number += len(rows)
        yield rows


@dataclass(frozen=True)
class TextFiles:
    """Files of texts, and the `options` of `read_texts` that hold for all of them."""

    paths: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def read(self, number: int) -> Iterator[Pair]:
        """The texts of one file."""
        return read_texts(self.paths[number], **self.options)


def chunks_of(files: TextFiles, number: int, size: int) -> Iterator[dict[str, Any]]:
    """One file in chunks of `size` texts; the last may have fewer, and is there for an empty file, too. Where the rows
    of a query belong together, a chunk goes on to the end of its last query."""
    start, chunk = 0, list[Pair]()
    try:
        with closing(files.read(number)) as texts:  # type: ignore[type-var]  # a generator
            by_query = files.options.get("by_query")
            parts: Iterable[list[Pair]] = queries_of(texts) if by_query else ([text] for text in texts)
            for part in parts:
                if len(chunk) >= size:
                    yield _chunk(number, start, chunk)
                    start = start + len(chunk)
                    chunk = []
                chunk += part
        yield _chunk(number, start, chunk, last=True)
    except (ValueError, OSError) as error:
        yield _chunk(number, start, [], last=True, error=str(error))


def texts_of(chunk: dict[str, Any]) -> list[Pair]:
    """The texts of a chunk."""
    return [tuple(row) for row in json.loads(chunk["texts"])]


def _chunk(file: int, start: int, texts: list[Pair], last: bool = False, error: str = "") -> dict[str, Any]:
    return {"file": file, "start": start, "last": last, "texts": json.dumps(texts), "error": error}
