"""A tiny adapter in a folder, calibrated, with its base model and a tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from badge_peft.evaluation import calibrate, collect_exit_logits
from tests.models import make_badge, make_model
from tests.texts import make_tokenizer, sentences

NAMES = {0: "bad", 1: "good"}


def save_adapter(folder: Path, num_labels: int = 2, **changes: Any) -> Path:
    """Of a random BERT, its config with `changes`; the texts of the calibration are `sentences(80)`."""
    names = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}} if num_labels == 2 else {}
    base, tokenizer = make_model("bert", num_labels=num_labels, **names, **changes), make_tokenizer()
    for part in (base, tokenizer):
        part.save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    model = make_badge(base=base)
    rows: list[dict[str, Any]] = [dict(tokenizer(text)) for text, _ in sentences(80)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = {"policy": "divergence", "patience": 1}
        if num_labels == 2:
            model.set_early_exit_config(calibrate(collect_exit_logits(model, rows), policy, target_blocks_saved=0.2))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "adapter")
    return folder / "adapter"


def close(found: Sequence[Any], expected: Sequence[Any], within: float = 1e-4) -> bool:
    """Whether these are the answers to the texts, and not to others: scores of a random model tell texts apart."""
    return [(a["label"], a["exit_layer"]) for a in found] == [(a["label"], a["exit_layer"]) for a in expected] and [
        a["score"] for a in found
    ] == pytest.approx([a["score"] for a in expected], abs=within)
