"""Words of a text and the tokens that answer for them: the first sub-token of each; the others need no answer.

Words are the tokens that the data has or, of plain text, those that the tokenizer splits it into before it looks for
sub-tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from badge_peft.evaluation.collate import SPECIAL
from badge_peft.evaluation.entities import OUTSIDE, EntityReader, scheme_of
from badge_peft.utils.problem import json_number
from badge_peft.utils.texts import whole

Array = np.ndarray
Text = str | list[str]


@dataclass(frozen=True)
class Words:
    """The W words of one text."""

    text: str  # of tokens, these with blanks in between
    spans: list[tuple[int, int]]  # where each word begins and ends, in characters
    places: list[int | None]  # of the token that answers for each; None: the text was cut, or the word is left out


def tokenize_words(
    texts: Sequence[Text], tokenizer: Any, max_length: int | None
) -> tuple[list[dict[str, Any]], list[Words]]:
    """Rows of token columns, with `special_tokens_mask` (0 for tokens that answer for a word), and the words of each
    text. The tokenizer is a fast one, which knows where its tokens are; None for `max_length` cuts nothing."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where its tokens are in a text: token classification takes a "
            "fast tokenizer (tokenizer.json)."
        )
    joined = [whole(text if isinstance(text, str) else " ".join(text)) for text in texts]
    cut: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded = tokenizer(joined, return_offsets_mapping=True, return_special_tokens_mask=True, **cut)
    rows, found = [], []
    for i, text in enumerate(texts):
        offsets, special = encoded["offset_mapping"][i], encoded[SPECIAL][i]
        real = [j for j, (first, last) in enumerate(offsets) if not special[j] and last > first]
        if isinstance(text, str):
            words = _own_words(joined[i], encoded.word_ids(i), offsets, real)
        else:
            words = _given_words(joined[i], text, offsets, real)
        asked = set(words.places)
        row = {name: encoded[name][i] for name in encoded if name not in ("offset_mapping", SPECIAL)}
        rows.append({**row, SPECIAL: [int(j not in asked) for j in range(len(offsets))]})
        found.append(words)
    return rows, found


def answers_of(words: Words, logits: Array, exits: Array, names: Sequence[str]) -> dict[str, Any]:
    """`tags` [W] of one text, O for a word that was cut off (None, if no tag is O), and `entities`: of each its
    `label`, `start` and `end` in the text, `text`, `score` (the mean probability of its words' tags, None where
    that is no number) and `exit_layer` (the deepest of its words'). Tags that name no entities make one of each word
    that is not O."""
    read = [w for w, place in enumerate(words.places) if place is not None]
    places = [place for place in words.places if place is not None]
    own = logits[places].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(own - own.max(axis=-1, keepdims=True, initial=-np.inf))
        sure = weights.max(axis=-1, initial=0) / weights.sum(axis=-1)
    numbers = own.argmax(axis=-1)
    tags: list[str | None] = [OUTSIDE if OUTSIDE in names else None] * len(words.places)
    for w, number in zip(read, numbers.tolist(), strict=True):
        tags[w] = names[number]
    if scheme_of(names) is not None:
        chunks = EntityReader(names).entities(numbers)
    else:
        said = ((k, names[number]) for k, number in enumerate(numbers.tolist()))
        chunks = [(k, k + 1, name) for k, name in said if name != OUTSIDE]
    entities = []
    for first, end, kind in chunks:
        start, last = words.spans[read[first]][0], words.spans[read[end - 1]][1]
        entities.append(
            {
                "label": kind,
                "start": start,
                "end": last,
                "text": words.text[start:last],
                "score": json_number(sure[first:end].mean()),
                "exit_layer": int(exits[places[first:end]].max()),
            }
        )
    return {"tags": tags, "entities": entities}


def _own_words(text: str, ids: Sequence[int | None], offsets: Sequence[tuple[int, int]], real: Sequence[int]) -> Words:
    """The tokenizer's own."""
    spans: dict[int, tuple[int, int]] = {}
    places: dict[int, int | None] = {}
    for j in real:
        word = ids[j]
        if word is None:
            continue
        first, last = offsets[j]
        spans[word] = (spans.get(word, (first, last))[0], last)
        places.setdefault(word, j)
    return Words(text, [_trimmed(text, span) for span in spans.values()], list(places.values()))


def _given_words(text: str, words: Sequence[str], offsets: Sequence[tuple[int, int]], real: Sequence[int]) -> Words:
    """Those of the data: each is answered by the first token in it that begins no earlier word."""
    spans, places, start, tokens = [], [], 0, iter(real)
    token = next(tokens, None)
    for word in words:
        end = start + len(word)
        while token is not None and offsets[token][1] <= start:
            token = next(tokens, None)
        is_own = token is not None and offsets[token][0] < end
        spans.append((start, end))
        places.append(token if is_own else None)
        token = next(tokens, None) if is_own else token
        start = end + 1
    return Words(text, spans, places)


def _trimmed(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """Without the blank that some tokenizers count to a word."""
    first, last = span
    word = text[first:last]
    return first + len(word) - len(word.lstrip()), last - (len(word) - len(word.rstrip()))
