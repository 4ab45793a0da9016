"""Tokenized rows of different lengths for the tiny models."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model

from badge_peft import BadgeConfig
from tests.models import LABELS, VOCAB, make_model


def make_rows(count: int, seed: int = 0, labels: bool = True) -> list[dict[str, Any]]:
    """Rows of 3 to 9 tokens without padding, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        length = int(torch.randint(3, 10, (1,), generator=generator))
        ids = torch.randint(4, VOCAB, (length,), generator=generator).tolist()
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
        if labels:
            row["label"] = int(torch.randint(0, LABELS, (1,), generator=generator))
        rows.append(row)
    return rows


def make_exits(case: str = "bert", **fields: Any) -> Any:
    """A tiny model with random bypasses and exits, in eval mode."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(case), BadgeConfig(task_type="SEQ_CLS", exit_pooling="mean", **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".badge_" in name and parameter.dim() == 2:
                parameter.normal_(0, 0.5)
    return model
