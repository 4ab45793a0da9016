"""The tokenizer of a model, and texts as the rows that a model reads."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from badge_peft.hub import has_tokenizer
from badge_peft.tuner.architectures import max_positions
from badge_peft.utils.texts import length_limit, longest_text, whole
from badge_peft.workflows.data import TextDataset


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
    texts, pairs = [whole(text) for text in texts], None if pairs is None else [whole(pair) for pair in pairs]
    encoded = tokenizer(texts, pairs, truncation=True, max_length=length_limit(tokenizer))
    return {name: list(values) for name, values in encoded.items()}
