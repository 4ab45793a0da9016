"""Pairs of a query and a document as rows of tokens, and which of them had to be cut."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """The rows of tokens, and how many of the pairs were longer than `max_length`.

    As in `sentence_transformers.CrossEncoder` the longer text of a pair is cut, token by token.
    """
    queries, documents = (list(texts) for texts in zip(*pairs, strict=True))
    columns = tokenizer(queries, documents, truncation=True, max_length=max_length)
    full = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) >= max_length]  # cut, or just as long
    cut = 0
    if full:
        whole = tokenizer([queries[i] for i in full], [documents[i] for i in full], truncation=False, verbose=False)
        cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], cut


def check_documents(query: Any, documents: Any) -> list[str]:
    """The documents as a list.

    Raises:
        ValueError: no query, no documents, or something else than texts.
    """
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"query={query!r} is empty or no text: give the question as a string.")
    if isinstance(documents, str):
        raise ValueError("documents is one string: give a list of texts.")
    if isinstance(documents, Mapping) or not isinstance(documents, Iterable):
        raise ValueError(f"documents is {type(documents).__name__}: give a list of texts.")
    texts = list(documents)
    if not texts:
        raise ValueError("documents is empty: there is nothing to rank.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"document {i} is {type(text).__name__}, not a text.")
    return texts


def warn_of_more(top_k: int, calibrated: int, stacklevel: int) -> None:
    """Warns of a `top_k` beyond that of the margins, by which they are used all the same; `stacklevel` as usual."""
    warnings.warn(
        f"the margins were calibrated for top_k={calibrated}, and {top_k} are asked for: how often these are full "
        f"depth's is not known. Calibrate with top_k={top_k}.",
        stacklevel=stacklevel,
    )
