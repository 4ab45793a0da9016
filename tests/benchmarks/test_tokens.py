"""`benchmarks/tokens.py`: the page says what was measured."""

from __future__ import annotations

from typing import Any

import tokens
from common import Results, describe


def point(name: str, score: float, saved: float, time: float) -> dict[str, Any]:
    found = {
        "name": name,
        "setting": "max_prob, threshold=0.9",
        "score": score,
        "saved": saved,
        "saved_by_tokens": 0.6,
    }
    return {**found, "time_saved": time, "full_p50_ms": 5.0, "timed_rows": 200}


def test_the_page(tmp_path) -> None:
    results = Results(tmp_path / "tokens.json")
    measured = {
        "points": [point("within a point", 0.4, 0.2, 0.1), point("50% saved", 0.35, 0.5, 0.3)],
        "exits": [1, 2],
        "per_exit": [0.3, 0.41],
        "accuracy": [0.8, 0.9],
        "texts": 1287,
        "tokens": 23394,
        "trained": 187099,
        "settings": {"epochs": 12, "adapter_lr": 0.005, "r": 32},
    }
    results.keep("tokens", {"data": "wnut17", "model": "mini", "environment": describe(1), **measured})
    text = " ".join(tokens.page(results).split())
    assert "WNUT-17, mini; backbone frozen: entity F1 41.0% at full depth; the setting" in text
    assert "scores 40.0% and saves 20.0% of the blocks and 10.0% of the time." in text
    assert "| 50% saved: max_prob, threshold=0.9 | 35.0% | -6.0 | 50.0% | 30.0% |" in text
    assert "has its answer after 40% of the blocks, the average text leaves after 80%" in text
    assert "1: 30.0%, 2: 41.0%. Token accuracy of the last: 90.0%" in text and "Time: 200 test texts" in text
