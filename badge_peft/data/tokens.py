"""`tokenise`: texts to what a model reads."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def tokenise(data: Dataset, tokenizer: Any, max_length: int = 128) -> Dataset:
    """`text` and `label` to `input_ids`, `attention_mask` (and what else the tokenizer gives) and `labels`.

    Args:
        data: From `split_texts`.
        tokenizer: Of the model.
        max_length: Longer texts are cut; the model's own limit holds too.
    """
    limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    encoded = tokenizer(list(data["text"][:]), truncation=True, max_length=limit)
    return Dataset.from_dict({**encoded, "labels": list(data["label"][:])})
