"""docs/ranking.md runs as printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import make_model
from tests.pages import ROOT, run

from .pairs import QUERY, all_scores, make_documents, make_ranker, pair_tokenizer


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = pair_tokenizer()
    make_model(num_labels=1).save_pretrained("base")
    tokenizer.save_pretrained("base")
    model = make_ranker()
    model.peft_config["default"].base_model_name_or_path = "base"
    spread = all_scores(model, tokenizer, QUERY, make_documents(9))[:, :, 0].std(dim=0)
    rule = {"policy": "top_k", "top_k": 2, "parameters": {"margins": spread.tolist()}}
    model.set_early_exit_config(rule)
    model.save_pretrained("my-reranker")
    queries = [f"{QUERY} {word}" for word in ("plot", "cast", "end", "story")]
    pairs = [(query, text) for i, query in enumerate(queries) for text in make_documents(8, seed=i)]
    rows: list[dict[str, Any]] = [dict(tokenizer(*pair)) for pair in pairs]
    space = run(
        ROOT / "docs" / "ranking.md",
        {
            "passages": make_documents(9),
            "model": model,
            "pairs": rows,
            "query_ids": [query for query, _ in pairs],
        },
    )
    assert len(space["best"]) == 2 and space["report"].candidates == 9
    assert space["config"].calibration["score"] >= 0.9
    assert model.get_early_exit_config() == space["config"]
