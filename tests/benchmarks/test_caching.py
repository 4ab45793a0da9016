"""`benchmarks/caching.py`: both ways are run as commands, and the page says what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import save_classifier
from tests.texts import sentences, write_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import caching  # noqa: E402


def run(way: str, repeat: int, seconds: float) -> dict[str, object]:
    states = {"kept": True, "bytes": 2_340_000_000} if way == "cached" else {"kept": False}
    measured = {
        "seconds": seconds,
        "cpu_seconds": seconds - 1,
        "training_seconds": seconds / 2,
        "s_avg": 0.5,
        "load": 1.5 + repeat,
    }
    return {"data": "reviews", "way": way, "repeat": repeat, "states": states, "train_rows": 8000, **measured}


def test_the_page() -> None:
    times = [("cached", 0, 10.0), ("uncached", 0, 50.0), ("cached", 1, 12.0), ("uncached", 1, 48.0)]
    stored = {"model": "mini", "epochs": 5, "threads": 1, "python": "3.11", "versions": {"torch": "2.9"}}
    text = caching.page({**stored, "runs": [run(*each) for each in times]})
    assert "| reviews | whole command, clock | 49.0 s (48.0-50.0) | 11.0 s (10.0-12.0) | 4.5x (4.0-5.0) |" in text
    assert "| reviews | whole command, processor | 48.0 s (47.0-49.0) | 10.0 s (9.0-11.0) | 4.9x (4.3-5.4) |" in text
    assert "| reviews | training alone, clock | 24.5 s (24.0-25.0) | 5.5 s (5.0-6.0) | 4.5x (4.0-5.0) |" in text
    assert "50.0 (50.0-50.0); 2.34 GB" in text and "8,000 texts" in text and "Medians of 2 runs" in text
    assert "4 times faster, by the processor's time: reached." in text
    slow = [run("cached", 0, 30.0), run("uncached", 0, 50.0)]
    text = caching.page({**stored, "runs": slow})
    assert "missed, it is 1.7 times" in text and "One run of each." in text
    text = caching.page({**stored, "runs": [run(*each) for each in times]})
    assert "load of the machine before a run 1.5 to 2.5" in text and "torch 2.9" in text


@pytest.mark.exhaustive
def test_both_ways_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_classifier(tmp_path / "model")
    (tmp_path / "reviews").mkdir()
    data = write_csv(tmp_path / "reviews" / "rows.csv", sentences(60))
    stored = tmp_path / "caching.json"
    arguments = ["--rows", "50", "--epochs", "2", "--repeats", "1", "--json", stored, "--docs", tmp_path / "page.md"]
    monkeypatch.setattr(sys, "argv", ["caching.py", model, str(data), *map(str, arguments)])
    caching.main()
    runs = json.loads(stored.read_text())["runs"]
    assert [(run["data"], run["way"], run["states"]["kept"]) for run in runs] == [
        ("reviews", "cached", True),
        ("reviews", "uncached", False),
    ]
    assert all(
        run["train_rows"] == 40 and run["seconds"] > run["training_seconds"] > 0 < run["cpu_seconds"] for run in runs
    )
    assert "| reviews | whole command, clock |" in (tmp_path / "page.md").read_text()
