"""`benchmarks/tasks.py` on a tiny model: the tasks stop where they should, and the page says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tasks
from latency_parts.forced import SIZES, build
from latency_parts.sessions import Sessions

TINY = SIZES["tiny"]


def test_every_way_stops_where_it_should(tmp_path: Path) -> None:
    assert tasks.stops(1, 12) == [12] and tasks.stops(3, 12) == [2, 7, 12]
    forced = build(TINY, [8])
    found = tasks.calls(forced, Sessions(forced, tmp_path, 1), "torch", tasks=3, rows=2, length=8)
    planned = [[2, 2], [3, 3], [4, 4]]
    assert found[tasks.ONE_PASS]() == found[tasks.EACH]() == planned and found[tasks.DEEPEST]() == planned[-1:]


@pytest.mark.exhaustive
def test_every_way_in_onnx_runtime_stops_where_it_should(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    forced = build(TINY, [8])
    found = tasks.calls(forced, Sessions(forced, tmp_path, 1), "onnx", tasks=3, rows=2, length=8)
    planned = [[2, 2], [3, 3], [4, 4]]
    assert found[tasks.ONE_PASS]() == found[tasks.EACH]() == planned and found[tasks.DEEPEST]() == planned[-1:]
    assert {path.parent.name for path in tmp_path.glob("*/model.onnx")} == {"plain", "early", "tasks-3"}


def test_tasks_that_stop_elsewhere_are_an_error() -> None:
    calls: Any = dict.fromkeys((tasks.DEEPEST, tasks.ONE_PASS, tasks.EACH, tasks.STOCK), lambda: [[2], [3]])
    with pytest.raises(RuntimeError, match="the tasks stop at"):
        tasks.measure_cell(calls, 2, tasks.Shape(1, 8, 1), build(TINY, [8]))


def test_what_was_measured_goes_on_and_becomes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = str(tmp_path / "tasks.json")
    arguments = ["--engines", "torch", "--sizes", "tiny", "--threads", "1", "--json", results, "--shapes", "1x8@1"]
    assert tasks.main([*arguments, "--tasks", "1"]) == 0
    assert tasks.main([*arguments, "--tasks", "1", "2"]) == 0
    (section,) = json.loads(Path(results).read_text()).values()
    assert [(row["rows"], row["length"], row["tasks"], row["rounds"]) for row in section["rows"]] == [
        (1, 8, 1, 1),
        (1, 8, 2, 1),
    ]
    for row in section["rows"]:
        assert row["ms"][tasks.STOCK][1] > 0 and row["gain"].keys() == {tasks.EACH, tasks.STOCK}
    monkeypatch.setattr(tasks, "TARGET", ("tiny", 1, 8, 2))
    assert tasks.main(["--json", results, "--docs", str(tmp_path / "tasks.md")]) == 0
    text = (tmp_path / "tasks.md").read_text()
    ratio = section["rows"][1]["ratio"][tasks.ONE_PASS][1]
    assert f"{ratio:.2f} in PyTorch (target 1.15: {'reached' if ratio <= 1.15 else 'missed'})" in text
    lines = [line for line in text.splitlines() if line.startswith("| PyTorch | tiny | 1 x 8 | ")]
    assert len(lines) == 2 and f"{ratio:.2f} [" in lines[0] and "--shapes 1x8@1" in text
