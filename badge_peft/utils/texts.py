"""Texts as a tokenizer takes them."""

from __future__ import annotations

from typing import Any

_NO_LIMIT = 100_000  # a tokenizer that knows no limit says 10^30


def whole(text: str) -> str:
    """`text` with a mark in the place of each half of a surrogate pair: JSON can write one, no tokenizer takes it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def length_limit(tokenizer: Any) -> int:
    """Tokens that a tokenizer reads of a text."""
    return min(tokenizer.model_max_length, _NO_LIMIT)
