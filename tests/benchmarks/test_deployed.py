"""The page of deployed classifiers: its figures and verdicts, from made-up records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from common import describe  # noqa: E402
from deployed_parts.page import LADDER, page, read_found  # noqa: E402


def early(score: float, blocks: float) -> dict[str, Any]:
    return {"score": score, "layer_speedup": blocks, "answers_as_full_depth": 0.97, "expected_time_saved": 0.4}


def adapter(score: float) -> dict[str, Any]:
    own = {**early(score, 0.6), "fixed_depth": early(0.89, 0.5)}
    return {"model": 0.9, "exit_layers": [0, 2], "per_exit": [0.8, 0.9], "drops": {"0.01": own, "0.005": own}}


def clock(saved: float, int8: float) -> dict[str, Any]:
    stock = dict.fromkeys((LADDER[0], LADDER[2]), 10.0) | dict.fromkeys((LADDER[1], LADDER[3]), 10 * (1 - saved))
    return {"one": {**stock, LADDER[4]: 3.0, LADDER[5]: 3.0 / int8}, "batch": stock, "threads": 1}


def made(folder: Path, records: dict[str, Any]) -> str:
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    names = dict.fromkeys(name.split(".")[0] for name in records)
    all_ = [SimpleNamespace(name=n, task=n.split("-")[0], backbone="tiny", own={"title": n}) for n in names]
    return page(read_found(folder, all_), describe(1))


def row(text: str, title: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"| {title}, tiny |")).strip("| ").split(" | ")


def test_values_are_means_with_their_range(tmp_path: Path) -> None:
    records = {f"a-tiny.default{i}": adapter(score) for i, score in enumerate((0.88, 0.9))}
    text = made(tmp_path, {**records, "a-tiny.clock0": clock(0.5, 2.5), "a-tiny.clock1": clock(0.6, 2.5)})
    found = row(text, "a-tiny")
    assert found[1:] == [
        "90.0%",
        "89.0% (88.0% to 90.0%)",
        "97.0%",
        "60.0%",
        "55.0% (50.0% to 60.0%)",
        "55.0% (50.0% to 60.0%)",
    ]


@pytest.mark.parametrize(
    ("score", "saved", "int8", "reached"),
    [(0.895, 0.8, 2.5, "yyyy"), (0.88, 0.8, 2.5, "nyyy"), (0.895, 0.6, 1.5, "ynny"), (0.895, -0.03, 2.5, "nnyn")],
)
def test_targets_can_be_missed(tmp_path: Path, score: float, saved: float, int8: float, reached: str) -> None:
    text = made(tmp_path, {"banking77-tiny.default0": adapter(score), "banking77-tiny.clock0": clock(saved, int8)})
    lines = [line for line in text.splitlines() if line.startswith("* ")]
    assert ["n" if "missed" in line else "y" for line in lines] == list(reached)
    assert ("not banking77-tiny" in lines[3]) == (reached[3] == "n")


def test_rivals_stand_beside(tmp_path: Path) -> None:
    rivals = {"full": {"score": 0.9, "ms": 10.0}, "first 1": {"score": 0.85, "ms": 2.0}}
    records = {"a-tiny.rivals": rivals, "a-tiny.linear": {"score": 0.7, "ms": 0.5}}
    text = made(tmp_path, {"a-tiny.default0": adapter(0.9), "a-tiny.plain0": adapter(0.87), **records})
    assert "No times are measured yet." in text
    assert "| 90.0% at 60.0% | 89.0% at 50.0% | 87.0% at 60.0% | 1: 85.0% at 80% | 70.0% |" in text
