"""`benchmarks/ranking.py` on a tiny model: it trains, calibrates, measures on other queries, times, and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from badge_peft import EarlyExitConfig, load_pretrained
from badge_peft.early_exit.policies import build_policy
from tests.models import make_model
from tests.ranking.pairs import make_documents, pair_tokenizer

pytest.importorskip("bm25s")
import ranking  # noqa: E402
from common import Results  # noqa: E402

WORDS = ("film", "plot", "story", "cast")


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quality` makes, and the numbers that `clock` would measure."""
    folder = tmp_path_factory.mktemp("ranking")
    make_model(num_labels=1).save_pretrained(folder / "encoder")
    pair_tokenizer().save_pretrained(folder / "encoder")
    data, shift, work = (folder / name for name in ("data", "collection", "work"))
    for place in (data, shift):
        place.mkdir()
    for number, split in enumerate(("train", "validation", "test")):
        documents = [make_documents(6, seed=10 * number + q) for q in range(4)]
        lines = [
            {"query_id": f"{split}-{q}", "query": f"was the {word} good", "document": document, "label": int(i == 0)}
            for q, word in enumerate(WORDS)
            for i, document in enumerate(documents[q])
        ]
        write(data / f"{split}.jsonl", lines)
    write(shift / "corpus.jsonl", [{"document_id": i, "text": t} for i, t in enumerate(make_documents(15, seed=3))])
    write(shift / "queries.jsonl", [{"query_id": q, "query": f"a {word}"} for q, word in enumerate(WORDS)])
    write(
        shift / "judgments.jsonl", [{"query_id": q, "document_id": d, "grade": 1} for q in range(4) for d in range(15)]
    )
    command = ["quality", "--encoder", str(folder / "encoder"), "--data", str(data), "--shift", str(shift)]
    small = ["--pool", "12", "--train-candidates", "6", "--epochs", "1", "--exit-epochs", "1", "--seeds", "0", "1"]
    given = [*command, *small, "--max-length", "40", "--threads", "1", "--work", str(work)]
    assert ranking.main(given) == 0
    return work


def test_what_is_measured(work: Path) -> None:
    found = Results(work / "ranking.json")["quality"]
    assert found["blocks"] == 3 and set(found["found"]) == {"test", "shift", "uncalibrated shift"}
    pool = [json.loads(line) for line in (work / "test.jsonl").read_text().splitlines()]
    assert len(pool) == 4 * 12 and {row["label"] for row in pool} == {0, 1}
    assert len((work / "train.jsonl").read_text().splitlines()) == 4 * 6
    rows = found["found"]["test"]["rows"]
    assert len(rows) == 3 * (2 * 2 + 2) and all(0 <= row[key] <= 1 for row in rows for key in ("kept", "recall"))
    stored = np.load(work / "test.npz")
    assert stored["exits"].shape == (2, 48, 4) and stored["head"].shape == (48, 3)
    np.testing.assert_array_equal(stored["exits"][0, :, -1], stored["head"][:, -1])


def test_a_row_is_what_the_adapter_does(work: Path) -> None:
    """The settings of the first seed, replayed on the scores that were stored."""
    config = EarlyExitConfig.of(load_pretrained(str(work / "exits-0")).get_early_exit_config())
    stored, pool = np.load(work / "test.npz"), (work / "test.jsonl").read_text().splitlines()
    ids = [json.loads(line)["query_id"] for line in pool]
    stops = build_policy(config).replay(stored["exits"][0][:, :, None], [0, 1, 2, 3], groups=ids)
    rows = Results(work / "ranking.json")["quality"]["found"]["test"]["rows"]
    (row,) = [row for row in rows if (row["way"], row["top_k"], row.get("seed")) == ("exits", 10, 0)]
    assert row["saved"] == pytest.approx(1 - stops.double().mean().item() / 3)


def test_the_page(work: Path, tmp_path: Path) -> None:
    ways = ("PyTorch, stock", "sentence-transformers `rank`", "PyTorch, early exits")
    seconds = dict(zip(ways, (0.3, 0.4, 0.2), strict=True))
    seconds |= {f"ONNX Runtime{kind}, {which}": 0.1 for kind in ("", " int8") for which in ("stock", "early exits")}
    found = [
        {"candidates": n, "way": way, "seconds": [s, 2 * s], "kept": [True, False], "saved": [0.5, 0.25]}
        for n in (10, 100)
        for way, s in seconds.items()
    ]
    made = Results(work / "ranking.json")["quality"]["made"]
    Results(work / "ranking.json").keep("clock", {"made": made, "found": found})
    assert ranking.main(["page", "--work", str(work), "--docs", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "600 ms by sentence-transformers" in page and "4.0 times faster" in page
    assert "| 10 | exits |" in page and "| 1 | clusters |" in page and "collection" in page
    assert "| 0.89 | reached |" in page  # a third of the time for 37.5% of the blocks
    assert "The cross-encoder learned from 24 pairs." in page and "--epochs 1" in page and "--bf16" not in page
    ranking.main(["page", "--work", str(work), str(work), "--docs", str(tmp_path / "both.md")])
    assert (tmp_path / "both.md").read_text(encoding="utf-8").count("## encoder, 3 blocks") == 2


def test_clusters() -> None:
    from ranking_parts.clusters import clusters_of, stops

    assert clusters_of(np.array([0.1, 0.9, 0.12, 0.5, 0.95, 0.52])).tolist() == [0, 2, 0, 1, 2, 1]
    scores = np.array([[-4.0, 0.0], [4.0, 1.0], [-3.9, 2.0], [0.0, 3.0], [4.1, 4.0], [0.1, 5.0]])
    codes = np.zeros(6, dtype=int)
    assert stops(scores, codes, 2, 0.0).tolist() == [1, 2, 1, 1, 2, 1]  # the two of the best cluster stay
    assert stops(scores, codes, 3, 0.0).tolist() == [1, 2, 1, 2, 2, 2]  # the third best is in the next
    assert stops(scores, codes, 2, 10.0).tolist() == [2] * 6  # never spread as widely
    assert stops(scores, codes, 6, 0.0).tolist() == [2] * 6


@pytest.mark.exhaustive
def test_it_times(work: Path) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("onnxscript")
    command = ["clock", "--work", str(work), "--threads", "1", "--rounds", "1", "--candidates", "3", "12"]
    assert ranking.main(command) == 0
    found = Results(work / "ranking.json")["clock"]["found"]
    assert len(found) == 2 * 7 and all(len(row["seconds"]) == 1 for row in found)
    assert all(row["kept"] == [True] for row in found if "stock" in row["way"] and "int8" not in row["way"])
