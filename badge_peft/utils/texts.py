"""Texts as a tokenizer takes them."""

from __future__ import annotations

from typing import Any

_NO_LIMIT = 100_000  # a tokenizer that knows no limit says 10^30


def whole(text: str) -> str:
    """`text` with a mark in the place of each half of a surrogate pair: JSON can write one, no tokenizer takes it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_in(value: Any, column: str | None, row: int) -> str:
    """The text that a data set has in a column; refuses what Python could write as one and nobody would: bytes, lists,
    objects."""
    if isinstance(value, (bytes, list, tuple, dict)):
        raise ValueError(
            f"row {row} has {type(value).__name__} in column {column!r}, {str(value)[:80]}: store texts as strings, "
            "or name another column."
        )
    return str(value)


def check_second_text(reads_pairs: bool, is_pair: bool) -> None:
    """Refuses one text for a model of pairs, which would answer something."""
    if reads_pairs and not is_pair:
        raise ValueError("this adapter was trained on pairs of texts, and here is one text: give the second one, too.")


def longest_text(tokenizer: Any, *limits: int | None) -> int:
    """Tokens of a text at most: the least of what a tokenizer reads and of the `limits` that are not None; 512 where
    none is known."""
    known = [limit for limit in (tokenizer.model_max_length, *limits) if limit is not None and limit <= _NO_LIMIT]
    return min(known, default=512)


def length_limit(tokenizer: Any) -> int:
    """Tokens that a tokenizer reads of a text."""
    return min(tokenizer.model_max_length, _NO_LIMIT)
