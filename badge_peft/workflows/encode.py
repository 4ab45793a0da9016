"""The tokenizer of a model, and texts, or their tokens with a label each, as the rows that a model reads."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from badge_peft.evaluation.entities import OUTSIDE
from badge_peft.evaluation.words import Words, tokenize_words
from badge_peft.hub import has_tokenizer
from badge_peft.tuner.architectures import max_positions
from badge_peft.utils.problem import NO_LABEL
from badge_peft.utils.texts import length_limit, longest_text, whole
from badge_peft.workflows.data import TextDataset

# of a word that is its entity's first, and of one that is its last: the tag is the first of these that the model knows
_PREFIXES = {(True, True): "SUBEI", (True, False): "BI", (False, True): "ELI", (False, False): "I"}


def load_tokenizer(path: str, model: Any, max_length: int | None = None) -> Any:
    """The tokenizer in a folder or Hub repository. It cuts texts at `max_length`, at its own limit or the model's,
    whichever is least, and is saved with that limit."""
    remedy = "Save it there with tokenizer.save_pretrained, or name where it is with --tokenizer."
    if not has_tokenizer(path):
        raise ValueError(f"{path} holds no tokenizer. {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the tokenizer in {path} cannot be loaded. {remedy} ({error})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"the tokenizer in {path} has no vocabulary. {remedy}")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no padding token, and texts of different lengths need one. Set "
            "tokenizer.pad_token = tokenizer.eos_token (or another token that no text has), and save it."
        )
    tokenizer.model_max_length = longest_text(tokenizer, max_positions(model), max_length)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def encode(rows: TextDataset, tokenizer: Any, targets: list[Any] | None = None) -> Dataset:
    """Token columns, and `labels` where there are targets; rows without a target are then left out."""
    if targets is None:
        return Dataset.from_dict(encode_texts(rows.texts, rows.pairs, tokenizer))
    index = [i for i, target in enumerate(targets) if target is not None]
    columns = encode_texts(rows.select(index).texts, rows.select(index).pairs, tokenizer)
    return Dataset.from_dict({**columns, "labels": [targets[i] for i in index]})


def encode_texts(texts: list[str], pairs: list[str] | None, tokenizer: Any) -> dict[str, list[Any]]:
    """Token columns, one list per text, cut at the tokenizer's limit."""
    texts = [whole(text) for text in texts]
    pairs = None if pairs is None else [whole(pair) for pair in pairs]
    encoded = tokenizer(texts, pairs, truncation=True, max_length=length_limit(tokenizer))
    return {name: list(values) for name, values in encoded.items()}


def encoded_rows(texts: list[str], pairs: list[str] | None, tokenizer: Any) -> list[dict[str, Any]]:
    """The same, row by row."""
    columns = encode_texts(texts, pairs, tokenizer)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def check_kind(rows: TextDataset, reads_tokens: bool, model: str, source: str | Path) -> None:
    """Refuses labels of texts where tokens are labeled, and the reverse."""
    column = rows.columns.get("label")
    if reads_tokens and rows.labels and not rows.tagged:
        raise ValueError(
            f"{model} labels tokens, and {source} has one label for each text (column {column!r}): give rows with "
            "tokens and tags, or with text and entities, or leave the labels out (--unlabeled)."
        )
    if not reads_tokens and (rows.tagged or rows.words is not None):
        raise ValueError(
            f"{model} classifies texts, and {source} has a label for each token (column {column!r}): give a model for "
            "token classification or an encoder without a head, or name a column of labels with --label-column."
        )


def check_one_text(pairs: Iterable[str | None] | None) -> None:
    """Refuses pairs of texts where tokens are labeled: the second ones would not be read."""
    if any(pair is not None for pair in pairs or ()):
        raise ValueError(
            "tokens of one text are labeled, and these are pairs of texts: leave the second ones out, or name the "
            "column of the texts with --text-column."
        )


def encode_tokens(rows: TextDataset, tokenizer: Any, names: Sequence[str] | None = None) -> Dataset:
    """Token columns, `special_tokens_mask` (1 for tokens that need no answer) and, where the rows have tags or
    entities, `labels`; rows without are then left out."""
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
