"""The code of README.md runs as printed, in one session, on tiny models in the folders that its commands make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig
from tests.models import make_model
from tests.pages import README, blocks, run
from tests.ranking.pairs import make_documents, make_ranker, pair_tokenizer
from tests.texts import make_tokenizer, save_base


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the README takes for granted, in a working directory with the adapters of its commands."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    save_base(tmp_path / "my-model")
    for folder in ("my-exits", "out/intent", "out/pii"):
        model = AutoModelForSequenceClassification.from_pretrained("my-model")
        adapter = get_peft_model(model, BadgeConfig(r=4, train_head=False, early_exit={"policy": "max_prob"}))
        adapter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    make_model(num_labels=1).save_pretrained("cross-encoder")
    pair_tokenizer().save_pretrained("cross-encoder")
    ranker = make_ranker()
    ranker.peft_config["default"].base_model_name_or_path = "cross-encoder"
    ranker.set_early_exit_config({"policy": "top_k", "top_k": 10, "parameters": {"margins": [0.1, 0.1, None]}})
    ranker.save_pretrained("my-reranker")
    return {
        "documents": make_documents(20),
        "batch": tokenizer(["the film was good", "a dull plot"], padding=True, return_tensors="pt"),
        "classifier": AutoModelForSequenceClassification.from_pretrained("my-model"),
    }


def test_readme_code_runs_as_printed(space: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    after = run(README, space)
    printed = capsys.readouterr().out
    assert "exit_layer" in printed and "trainable params" in printed and "tensor(" in printed
    assert len(after["best"]) == 10
    assert after["out"].logits.shape == (2, 2) and set(after["out"].exit_layer.tolist()) <= {1, 2, 3}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert not [block for block in blocks(README) if block.skipped]
