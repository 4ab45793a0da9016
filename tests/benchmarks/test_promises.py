"""`benchmarks/promises.py`: what is missing is measured, and the page says so."""

from __future__ import annotations

import json
from pathlib import Path

import promises
import pytest

from tests.evaluation.logits import plausible


def test_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plausible(rows=600).save(tmp_path / "pool.safetensors")
    results, page = tmp_path / "promises.json", tmp_path / "promises.md"
    files = ["--logits", f"task={tmp_path}/pool.safetensors", "--json", str(results)]
    sizes = ["--sizes", "200", "3000", "--policies", "max_prob", "--draws", "1"]
    assert promises.main([*files, *sizes, "--methods", "calibrate"]) == 0
    stored = json.loads(results.read_text())
    assert list(stored) == ["task/max_prob/200"] and list(stored["task/max_prob/200"]) == ["calibrate"]  # 3000 > 600
    found = stored["task/max_prob/200"]["calibrate"]
    monkeypatch.setitem(promises.METHODS, "calibrate", None)
    assert promises.main([*files, *sizes]) == 0
    stored = json.loads(results.read_text())["task/max_prob/200"]
    assert stored["calibrate"] == found and len(stored["on itself"]["excess"]) == 1
    assert promises.main(["--json", str(results), "--docs", str(page)]) == 0
    depth = 12 * (1 - stored["best exit"]["speedup"][0])
    assert depth == pytest.approx(round(depth), abs=1e-3)  # one block answers every row
    own, best = (stored[name]["excess"][0] for name in ("on itself", "best exit"))
    row = next(line for line in page.read_text().splitlines() if line.startswith("| task | 200 | 1 | on itself |"))
    assert [row.split(" | ")[i] for i in (4, 7)] == [f"{own - best - 1:+.2f}", f"{own:+.2f}"]


def test_the_page_says_where_no_setting_could_reach_the_target() -> None:
    def drew(*excess: float) -> dict[str, list[float]]:
        return {"excess": [*excess], "speedup": [0.5] * len(excess)}

    data = {
        "near/max_prob/200": {"calibrate": drew(0.1, 0.2), "best exit": drew(0.5, 0.6)},
        "far/max_prob/200": {"calibrate": drew(2.0, 3.0), "best exit": drew(-1.0, -1.0)},
        "noisy/max_prob/200": {"calibrate": drew(0.2, 1.5), "best exit": drew(0.2, 1.4)},
    }
    named, truly = promises.page(data).split("truly best, tasks")
    for what in ("in the mean", "at the 90th percentile"):
        assert f"{what}: 2 of 3; missed: far 200 rows.\n" in named
        both = f"{what}: 1 of 3; missed: far 200, noisy 200 rows (by the best exit alone, too: noisy 200 rows).\n"
        assert both in truly


def test_auto_is_compared_with_the_best_single_policy() -> None:
    def drew(saved: float, excess: float) -> dict[str, dict[str, list[float]]]:
        return {"calibrate": {"excess": [excess], "speedup": [saved]}}

    data = {
        "near/auto/200": drew(0.50, -0.5),
        "near/entropy/200": drew(0.55, -0.1),
        "near/max_prob/200": drew(0.90, 0.4),  # loses too much to count
        "far/auto/200": drew(0.30, -0.5),
        "far/entropy/200": drew(0.50, -0.1),
    }
    text = promises.page(data).split("## Auto against")[1]
    assert "At least 90% of it: 1 of 2; less: far 200 rows." in text
    assert "| near | 200 | 50.0% (-0.50) | 55.0% (-0.10) | entropy |" in text


def test_a_data_set_is_divided(tmp_path: Path) -> None:
    lines = {"train": ["a", "b", "c"], "validation": ["d"], "test": ["e", "f"]}
    for name, own in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in own))
    assert promises.main(["--divide", "2", str(tmp_path), str(tmp_path / "out")]) == 0
    train, pool = ((tmp_path / "out" / f"{name}.jsonl").read_text().split() for name in ("train", "pool"))
    assert len(train) == 2 and sorted(train + pool) == ["a", "b", "c", "d", "e", "f"] != train + pool
