"""`benchmarks/tasks.py` on a tiny model: the tasks stop where they should, and the page says what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tasks  # noqa: E402
from latency_parts.forced import build  # noqa: E402
from latency_parts.settings import SIZES  # noqa: E402
from task_parts import page, ways  # noqa: E402

TINY = SIZES["tiny"]


@pytest.mark.parametrize("carry", [None, "logits"])
def test_every_way_stops_where_it_should(carry: str | None) -> None:
    assert ways.stops(1, 12) == [12] and ways.stops(3, 12) == [2, 7, 12]
    found = ways.TorchWays(build(TINY, [8], carry=carry)).calls(tasks=3, rows=2, length=8)
    planned = [[2, 2], [3, 3], [4, 4]]
    assert found[ways.ONE_PASS]() == found[ways.EACH]() == planned and found[ways.DEEPEST]() == planned[-1:]


@pytest.mark.exhaustive
def test_every_way_in_onnx_runtime_stops_where_it_should(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = ways.OnnxWays(build(TINY, [8]), tmp_path, threads=1, int8=False).calls(tasks=3, rows=2, length=8)
    planned = [[2, 2], [3, 3], [4, 4]]
    assert found[ways.ONE_PASS]() == found[ways.EACH]() == planned and found[ways.DEEPEST]() == planned[-1:]
    assert {path.parent.name for path in tmp_path.glob("*/model.onnx")} == {"plain", "early", "tasks-3"}


def test_tasks_that_stop_elsewhere_are_an_error() -> None:
    calls: Any = dict.fromkeys((ways.DEEPEST, ways.ONE_PASS, ways.EACH, ways.STOCK), lambda: [[2], [3]])
    with pytest.raises(RuntimeError, match="the tasks stop at"):
        tasks.measure(calls, 2, tasks.Shape(1, 8, 1), 4)


def test_what_was_measured_goes_on_and_becomes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = str(tmp_path / "tasks.json")
    arguments = ["--engines", "torch", "--sizes", "tiny", "--threads", "1", "--json", results, "--shapes", "1x8@1"]
    assert tasks.main([*arguments, "--tasks", "1"]) == 0
    assert tasks.main([*arguments, "--tasks", "1", "2", "--resume"]) == 0
    (section,) = json.loads(Path(results).read_text())["sections"].values()
    assert [(row["rows"], row["length"], row["tasks"], row["rounds"]) for row in section["rows"]] == [
        (1, 8, 1, 1),
        (1, 8, 2, 1),
    ]
    for row in section["rows"]:
        assert row["ms"][ways.STOCK][1] > 0 and row["gain"].keys() == {ways.EACH, ways.STOCK}
    monkeypatch.setattr(page, "_TARGET", ("tiny", 1, 8, 2))
    assert tasks.main(["--json", results, "--docs", str(tmp_path / "tasks.md")]) == 0
    text = (tmp_path / "tasks.md").read_text()
    ratio = section["rows"][1]["ratio"][ways.ONE_PASS][1]
    assert f"{ratio:.2f} in PyTorch (target 1.15: {'reached' if ratio <= 1.15 else 'missed'})" in text
    lines = [line for line in text.splitlines() if line.startswith("| PyTorch | tiny | 1 x 8 | ")]
    assert len(lines) == 2 and f"{ratio:.2f} [" in lines[0] and "--shapes 1x8@1" in text
