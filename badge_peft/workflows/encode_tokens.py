"""Rows with tags or entities as the rows that a model reads: a label for the first sub-token of each word."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from typing import Any

from datasets import Dataset

from badge_peft.evaluation.entities import OUTSIDE
from badge_peft.evaluation.words import Words, tokenize_words
from badge_peft.utils.problem import NO_LABEL
from badge_peft.utils.texts import length_limit
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.kinds import check_one_text

# of a word that is its entity's first, and of one that is its last: the tag is the first of these that the model knows
_PREFIXES = {(True, True): "SUBEI", (True, False): "BI", (False, True): "ELI", (False, False): "I"}


def encode_tokens(rows: TextDataset, tokenizer: Any, names: Sequence[str] | None = None) -> Dataset:
    """Token columns, `special_tokens_mask` (1 for tokens that need no answer) and, where the rows have tags or
    entities, `labels`; rows without are then left out.

    Args:
        rows: As read.
        tokenizer: As for `tokenize_words`.
        names: The tags that the model knows, by number; None: rows are taken to have none.

    Raises:
        ValueError: a tag or a kind of entity that the model does not know; the message names the row.
    """
    check_one_text(rows.pairs)
    if rows.tagged and names is not None:
        rows = rows.labeled()
    columns, words = tokenize_words(rows.words or rows.texts, tokenizer, length_limit(tokenizer))
    if rows.tagged and names is not None and rows.labels is not None:
        numbers = {name: i for i, name in enumerate(names)}
        for i, (row, own, labels) in enumerate(zip(columns, words, rows.labels, strict=True)):
            tags = labels if rows.words is not None else _tags_of(labels, own, numbers)
            unknown = next((tag for tag in tags if tag not in numbers), None)
            if unknown is not None:
                raise ValueError(
                    f"row {rows.number(i)} has the tag {unknown!r}, which the model does not know; it knows "
                    f"{', '.join(names[:20])}. Rename it, or leave the row out."
                )
            row["labels"] = [NO_LABEL] * len(row["input_ids"])
            for tag, place in zip(tags, own.places, strict=True):
                if place is not None:
                    row["labels"][place] = numbers[tag]
        lost = sum(place is None for own in words for place in own.places)
        if lost:
            total = sum(len(own.places) for own in words)
            warnings.warn(
                f"{lost} of {total} tokens are not scored: their text is longer than the {length_limit(tokenizer)} "
                "tokens that are read of one, or the tokenizer makes nothing of them.",
                stacklevel=2,
            )
    return Dataset.from_list(columns)


def _tags_of(entities: Sequence[dict[str, Any]], words: Words, names: Container[str]) -> list[str]:
    """[W]: the tags of the words that lie in entities, in whole or in part, in the scheme of `names`."""
    tags = [OUTSIDE] * len(words.spans)
    for entity in sorted(entities, key=lambda e: e["start"]):
        inside = [w for w, (a, b) in enumerate(words.spans) if a < entity["end"] and b > entity["start"]]
        for w in inside:
            if tags[w] == OUTSIDE:
                prefixes = _PREFIXES[w == inside[0], w == inside[-1]]
                usual = [*(f"{prefix}-{entity['label']}" for prefix in prefixes), entity["label"]]
                tags[w] = next((tag for tag in usual if tag in names), f"B-{entity['label']}")
    return tags
