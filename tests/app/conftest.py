"""Tiny adapters in folders, of each kind of problem, for the page to open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, collect_exit_logits
from badge_peft.app.page import Callbacks
from badge_peft.hub import LOGITS
from badge_peft.workflows.adapter_dir import open_adapter
from tests.cli.conftest import cli, save_classifier
from tests.early_exit.reference import REGRESSION, SINGLE
from tests.models import shake
from tests.texts import make_tokenizer, sentences

__all__ = ["cli"]  # a fixture of the commands' tests

BLOCKS = 5
Make = Callable[..., Path]


def save_adapter(
    folder: Path, names: tuple[str, ...] = ("bad", "good"), kind: str = SINGLE, logits: int = 0, **fields: Any
) -> Path:
    """An adapter of five blocks whose exits differ, in `folder/adapter`, its base beside it; with the exit logits of
    `logits` texts where that is not 0."""
    base = save_classifier(folder / "model", names, problem_type=kind, num_hidden_layers=BLOCKS)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base), BadgeConfig(r=4, task_type="SEQ_CLS", **fields)
    ).eval()
    shake(model)
    out = folder / "adapter"
    model.save_pretrained(str(out))
    if logits:
        rows = sentences(logits)
        encoded = make_tokenizer()([text for text, _ in rows])
        labels = [float(len(text)) if kind == REGRESSION else int(label == "good") for text, label in rows]
        data = [
            {**{k: encoded[k][i] for k in ("input_ids", "attention_mask")}, "labels": labels[i]} for i in range(logits)
        ]
        collect_exit_logits(model, data).save(out / LOGITS)
    return out


_SAVED: dict[str, Path] = {}


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`save_adapter` once for each set of arguments; copies of the adapters, each in a folder of its own."""

    def made(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in _SAVED:
            _SAVED[key] = save_adapter(tmp_path_factory.mktemp("saved"), **fields)
        return Path(shutil.copytree(_SAVED[key], tmp_path / f"{len(list(tmp_path.iterdir()))}" / "adapter"))

    return made


def opened(adapter: Path, **rule: Any) -> Callbacks:
    """What a page of this adapter calls."""
    found = open_adapter(adapter, device="cpu")
    return Callbacks(found, str(adapter), found.early_exit_config(**rule))
