"""`benchmarks/tasks.py` on a tiny model: the tasks stop where they should, and the page says what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tasks  # noqa: E402
from latency_parts.forced import build  # noqa: E402
from latency_parts.settings import SIZES  # noqa: E402

TINY = SIZES["tiny"]


def test_every_way_stops_where_it_should() -> None:
    assert tasks.stops(1, 12) == [12] and tasks.stops(3, 12) == [2, 7, 12]
    ways = tasks.calls(build(TINY, [8]), tasks=3, rows=2, length=8)
    planned = [[2, 2], [3, 3], [4, 4]]
    assert ways["one pass"]() == ways["a call each"]() == planned and ways["deepest alone"]() == planned[-1:]


def test_tasks_that_stop_elsewhere_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forced = build(TINY, [8])
    monkeypatch.setattr(tasks, "calls", lambda *_: {name: lambda: [[2], [3]] for name in ("one pass", "a call each")})
    with pytest.raises(RuntimeError, match="one pass: the tasks stop at"):
        tasks.measure(forced, 2, 1, 8, rounds=1)


def test_the_page(tmp_path: Path) -> None:
    page = tmp_path / "tasks.md"
    arguments = "--sizes tiny --tasks 1 2 --rows 1 --rounds 1 --threads 1 --lengths 8 --docs".split()
    assert tasks.main([*arguments, str(page)]) == 0
    lines = [line for line in page.read_text().splitlines() if line.startswith("| tiny")]
    assert [line.split(" | ")[:4] for line in lines] == [["| tiny", "1", "8", "1"], ["| tiny", "1", "8", "2"]]
    command = "python benchmarks/tasks.py --sizes tiny --tasks 1 2 --rows 1 --lengths 8 \\\n    --rounds 1 --threads 1"
    assert command in page.read_text()
