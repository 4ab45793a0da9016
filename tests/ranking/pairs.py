"""A tiny cross-encoder with exits, its tokenizer for pairs, and documents of many lengths."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing

from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.collate import pad_features
from tests.models import make_badge, make_model
from tests.texts import BAD, GOOD, WORDS, make_tokenizer

QUERY = "was the film good"


def pair_tokenizer(end: str = " [SEP]:1") -> Any:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair=f"[CLS] $A [SEP] $B:1{end}", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return tokenizer


def make_documents(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    rng = random.Random(seed)
    words = (*WORDS, *GOOD, *BAD)
    return [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(count)]


def make_ranker(case: str = "bert", blocks: int = 3, **fields: Any) -> Any:
    """A PEFT model with one output and exits that say something."""
    base = make_model(case, num_labels=1, num_hidden_layers=blocks)
    return make_badge(case, base, train_head=False, **fields)


def all_scores(model: Any, tokenizer: Any, query: str, documents: list[str], max_length: int = 40) -> torch.Tensor:
    """[N, E, 1], by one padded full-depth call."""
    columns = tokenizer([query] * len(documents), documents, truncation=True, max_length=max_length)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    with torch.no_grad():
        return model(**pad_features(rows, model.base_model.model)).exit_logits


def expected(scores: torch.Tensor, exits: list[int], config: Any, top_k: int) -> tuple[list[int], torch.Tensor]:
    """The best candidates, and the block at which each stopped, by replay."""
    stops = build_policy(config).replay(scores, exits)
    end = exits.index(int(stops.max()))
    left = [n for n in range(len(scores)) if stops[n] == stops.max()]
    return sorted(left, key=lambda n: -scores[n, end, 0].item())[:top_k], stops
