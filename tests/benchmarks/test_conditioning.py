"""The page that compares exits with regressions: from made-up results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from common import Results  # noqa: E402
from conditioning import BACKBONE, SEEDS, TRAININGS, page  # noqa: E402


def made(path: Path, now: list[list[float]], regression: list[float]) -> str:
    results = Results(path)
    results.keep("where", "a machine")
    results.keep("sst2/cls/regression", regression)
    for seed, scores in zip(SEEDS, now, strict=True):
        results.keep(f"sst2/cls/now/{seed}", scores)
        results.keep(f"sst2/cls/before/{seed}", [0.5] * BACKBONE.blocks)
    return page(results)


def exits(first: float) -> list[float]:
    return [first, *[0.8] * (BACKBONE.blocks - 1)]


@pytest.mark.parametrize(
    ("lowest", "said"), [(0.69, "reached"), (0.65, "missed: below are SST-2, first token, exit 1")]
)
def test_exits_a_point_below_the_regression_are_named(tmp_path: Path, lowest: float, said: str) -> None:
    text = made(tmp_path / "r.json", [exits(lowest), exits(0.70), exits(0.71)], exits(0.70))
    assert (said in text) and ("| SST-2, first token | now |" in text)
    assert ("below are" in text) is (lowest < 0.67)


def test_tasks_that_are_not_through_are_left_out(tmp_path: Path) -> None:
    results: dict[str, Any] = Results(tmp_path / "r.json")
    results.keep("where", "a machine")  # type: ignore[attr-defined]
    results.keep("sst2/cls/now/0", exits(0.7))  # type: ignore[attr-defined]
    assert "SST-2" not in page(results) and set(TRAININGS) == {"now", "before"}  # type: ignore[arg-type]
