"""`benchmarks/caching.py`: both ways are run as commands, and the page says what was measured."""

from __future__ import annotations

from pathlib import Path

import caching
import pytest
from common import Results, describe

from tests.cli.conftest import save_classifier
from tests.texts import sentences, write_csv


def run(way: str, repeat: int, seconds: float) -> dict[str, object]:
    states = {"kept": True, "bytes": 2_340_000_000} if way == "cached" else {"kept": False}
    times = {"seconds": seconds, "cpu_seconds": seconds - 1, "training_seconds": seconds / 2}
    return {**times, "s_avg": 0.5, "load": 1.5 + repeat, "states": states, "train_rows": 8000}


def page(tmp_path: Path, *times: tuple[str, int, float]) -> str:
    results = Results(tmp_path / f"{len(times)}.json")
    results.keep("about", {"model": "mini", "epochs": 5, "environment": describe(1)})
    for each in times:
        results.keep(f"reviews/{each[0]}/{each[1]}", run(*each))
    return caching.page(results)


def test_the_page(tmp_path: Path) -> None:
    text = page(tmp_path, ("cached", 0, 10.0), ("uncached", 0, 50.0), ("cached", 1, 12.0), ("uncached", 1, 48.0))
    assert "| reviews | whole command, clock | 49.0 s (48.0-50.0) | 11.0 s (10.0-12.0) | 4.5x (4.0-5.0) |" in text
    assert "| reviews | whole command, processor | 48.0 s (47.0-49.0) | 10.0 s (9.0-11.0) | 4.9x (4.3-5.4) |" in text
    assert "50.0 (50.0-50.0); 2.34 GB" in text and "8,000 texts" in text and "Medians of 2 runs" in text
    assert "4 times faster, by the processor's time: reached" in text
    assert "load of the machine before a run 1.5 to 2.5" in text
    text = page(tmp_path, ("cached", 0, 30.0), ("uncached", 0, 50.0))
    assert "missed,\nit is 1.7 times" in text


@pytest.mark.exhaustive
def test_both_ways_are_measured(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "model")
    (tmp_path / "reviews").mkdir()
    data = write_csv(tmp_path / "reviews" / "rows.csv", sentences(60))
    store = ["--json", str(tmp_path / "caching.json")]
    few = ["--rows", "50", "--epochs", "2", "--repeats", "1"]
    assert caching.main([model, str(data), *few, *store]) == 0
    results = Results(tmp_path / "caching.json")
    for way, kept in (("cached", True), ("uncached", False)):
        (run,) = results.below(f"reviews/{way}").values()
        assert run["states"]["kept"] == kept and run["train_rows"] == 40
        assert run["seconds"] > run["training_seconds"] > 0 < run["cpu_seconds"]
    assert caching.main([*store, "--docs", str(tmp_path / "page.md")]) == 0
    assert "| reviews | whole command, clock |" in (tmp_path / "page.md").read_text()
