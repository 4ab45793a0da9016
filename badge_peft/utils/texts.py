"""Texts as a tokenizer takes them."""

from __future__ import annotations

from typing import Any

_NO_LIMIT = 100_000  # a tokenizer that knows no limit says 10^30


def whole(text: str) -> str:
    """`text` with a mark in the place of each half of a surrogate pair: JSON can write one, no tokenizer takes it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def longest_text(tokenizer: Any, *limits: int | None) -> int:
    """Tokens of a text at most: what a tokenizer reads, 512 where it knows no limit, or the least of the `limits` that
    are not None."""
    own = 512 if tokenizer.model_max_length > _NO_LIMIT else tokenizer.model_max_length
    return min([own, *(limit for limit in limits if limit is not None)])


def length_limit(tokenizer: Any) -> int:
    """Tokens that a tokenizer reads of a text."""
    return min(tokenizer.model_max_length, _NO_LIMIT)
