"""The tokenizer of a model, and texts as the rows that a model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer

from badge_peft.hub import has_tokenizer
from badge_peft.tuner.architectures import max_positions
from badge_peft.workflows.data import TextDataset

_NO_LIMIT = 100_000  # a tokenizer that knows no limit says 10^30


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a folder or Hub repository.

    Raises:
        ValueError: there is none, or one without a vocabulary.
    """
    remedy = "Save it there with tokenizer.save_pretrained, or name where it is with --tokenizer."
    if not has_tokenizer(path):
        raise ValueError(f"{path} holds no tokenizer. {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the tokenizer in {path} cannot be loaded. {remedy} ({error})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"the tokenizer in {path} has no vocabulary. {remedy}")
    return tokenizer


def limit_length(tokenizer: Any, model: nn.Module, max_length: int | None) -> int:
    """Tokens per text: `max_length`, the tokenizer's limit and the model's, whichever is least. The tokenizer keeps
    it, so that it is saved with it.

    Args:
        tokenizer: Its `model_max_length` is set.
        model: That will read the texts.
        max_length: None takes what the model can read.
    """
    limits = [512 if tokenizer.model_max_length > _NO_LIMIT else tokenizer.model_max_length]
    positions = max_positions(model)
    if positions is not None:
        limits.append(positions)
    if max_length is not None:
        limits.append(max_length)
    tokenizer.model_max_length = min(limits)
    return min(limits)


def encode(rows: TextDataset, tokenizer: Any, targets: list[Any] | None = None) -> Dataset:
    """Token columns, and `labels` where there are targets; rows without a target are then left out."""
    kept = rows
    if targets is not None:
        index = [i for i, target in enumerate(targets) if target is not None]
        kept, targets = rows.select(index), [targets[i] for i in index]
    return Dataset.from_dict(
        {
            **encode_texts(kept.texts, kept.pairs, tokenizer),
            **({} if targets is None else {"labels": targets}),
        }
    )


def encode_texts(texts: list[str], pairs: list[str] | None, tokenizer: Any) -> dict[str, list[Any]]:
    """Token columns, one list per text, cut at the tokenizer's limit."""
    encoded = tokenizer(texts, pairs, truncation=True, max_length=min(tokenizer.model_max_length, _NO_LIMIT))
    return {name: list(values) for name, values in encoded.items()}
