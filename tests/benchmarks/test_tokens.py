"""`benchmarks/tokens.py`: the page says what was measured, with times and without."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tokens  # noqa: E402


def point(rule: str, score: float, saved: float, time: float | None) -> dict[str, Any]:
    found = {
        "rule": rule,
        "setting": "max_prob, threshold=0.9",
        "score": score,
        "saved": saved,
        "saved_by_tokens": 0.6,
    }
    timed = {"saved": time, "blocks_saved": saved, "p50_ms": 4.0, "full_p50_ms": 5.0, "rows": 200}
    return found if time is None else {**found, "time": timed}


def measured(time: float | None) -> dict[str, Any]:
    return {
        "points": [point("within a point", 0.4, 0.2, time), point("50% saved", 0.35, 0.5, time)],
        "exits": [1, 2],
        "per_exit": [0.3, 0.41],
        "accuracy": [0.8, 0.9],
        "texts": 1287,
        "tokens": 23394,
        "num_blocks": 2,
        "trained": 187099,
        "epochs": 12,
        "adapter_lr": 0.005,
        "r": 32,
    }


def test_the_page() -> None:
    environment = {"cpu": "a processor", "threads": 1, "load_1min": 0.1, "python": "3.11", "date": "today"}
    found = {"data": "wnut17", "model": "mini", "environment": {**environment, "versions": {"torch": "2.9"}}}
    text = " ".join(
        tokens.page({**found, "frozen": measured(0.1), "full": measured(0.2)}, argparse.Namespace()).split()
    )
    assert "WNUT-17, mini; backbone frozen: entity F1 41.0% at full depth; the setting" in text
    assert "scores 40.0% and saves 20.0% of the blocks and 10.0% of the time; backbone trained with the exits" in text
    assert "| 50% saved: max_prob, threshold=0.9 | 35.0% | -6.0 | 50.0% | 10.0% |" in text
    assert "has its answer after 40% of the blocks, the average text leaves after 80%" in text
    assert "1: 30.0%, 2: 41.0%. Token accuracy of the last: 90.0%" in text and "Time: 200 test texts" in text
    plain = " ".join(tokens.page({**found, "frozen": measured(None)}, argparse.Namespace()).split())
    assert "time saved" not in plain and "--backbones frozen --rows 0 --docs" in plain
    assert "Time was not measured in this run." in plain
    assert "| within a point: max_prob, threshold=0.9 | 40.0% | -1.0 | 20.0% |" in plain
