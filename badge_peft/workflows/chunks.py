"""The texts of files in chunks, as plain data that goes from one process to another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from badge_peft.workflows.columns import Names
from badge_peft.workflows.rankings import queries_of
from badge_peft.workflows.settings import TextColumns
from badge_peft.workflows.stream import Pair, read_texts


@dataclass(frozen=True)
class TextFiles:
    """Files of texts, as for `read_texts`.

    Args:
        paths: Of the files.
        format: Of all of them; None goes by their names.
        columns: Where the texts are.
        recorded: What training recorded of its columns.
        tokens: Whether a text may be a list of tokens.
        by_query: Whether the rows of a query belong together, as for `read_texts`.
    """

    paths: Sequence[str]
    format: str | None = None
    columns: TextColumns = TextColumns()
    recorded: Names = field(default_factory=dict)
    tokens: bool = False
    by_query: bool = False

    def read(self, number: int) -> Iterator[Pair]:
        """The texts of one file."""
        return read_texts(self.paths[number], self.format, self.columns, self.recorded, self.tokens, self.by_query)


def chunks_of(files: TextFiles, number: int, size: int) -> Iterator[dict[str, Any]]:
    """One file in chunks of `size` texts; the last may have fewer, and is there for an empty file, too. Where the rows
    of a query belong together, a chunk goes on to the end of its last query."""
    start, chunk = 0, list[Pair]()
    try:
        with closing(files.read(number)) as texts:  # type: ignore[type-var]  # a generator
            parts: Iterable[list[Pair]] = queries_of(texts) if files.by_query else ([text] for text in texts)
            for part in parts:
                if len(chunk) >= size:
                    yield _chunk(number, start, chunk)
                    start, chunk = start + len(chunk), []
                chunk += part
        yield _chunk(number, start, chunk, last=True)
    except (ValueError, OSError) as error:
        yield _chunk(number, start, [], last=True, error=str(error))


def texts_of(chunk: dict[str, Any]) -> list[Pair]:
    """The texts of a chunk."""
    return [tuple(row) for row in json.loads(chunk["texts"])]


def _chunk(file: int, start: int, texts: list[Pair], last: bool = False, error: str = "") -> dict[str, Any]:
    return {"file": file, "start": start, "last": last, "texts": json.dumps(texts), "error": error}
