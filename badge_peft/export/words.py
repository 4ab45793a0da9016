"""Texts for an exported file that labels tokens, and what it found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from badge_peft.evaluation.collate import SPECIAL
from badge_peft.evaluation.words import Words, answers_of, tokenize_words


def word_inputs(texts: Sequence[Any], tokenizer: Any, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Words]]:
    """Texts, or lists of tokens, as inputs of a graph, in which the first sub-token of each word answers for it, and
    the words of each.

    Args:
        texts: One or more.
        tokenizer: A fast one.
        config: What `early_exit.json` says.
    """
    rows, words = tokenize_words(texts, tokenizer, config["max_length"])
    longest = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": tokenizer.pad_token_id or 0, SPECIAL: 1}
    return {
        name: np.array([row[name] + [fills.get(name, 0)] * (longest - len(row[name])) for row in rows])
        for name in config["inputs"]
        if name in rows[0]
    }, words


def entities_of(words: Sequence[Words], output: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """What was found in each text of a batch, and where it left.

    Args:
        words: Of each text.
        output: An `OnnxOutput` of tokens.
        names: Of the labels.
    """
    return [
        {"entities": answers_of(own, logits, exits, names)["entities"], "exit_layer": int(exits.max())}
        for own, logits, exits in zip(words, output.logits, output.exit_layer, strict=True)
    ]
