"""`benchmarks/mixed.py` on a tiny model: the ways agree on the exits, and the page says what was measured."""

from __future__ import annotations

from pathlib import Path

import mixed
import pytest
from latency_parts.forced import SIZES, build, even_exits

TINY = SIZES["tiny"]


def test_every_way_gives_the_forced_exits() -> None:
    forced = build(TINY, [8])
    planned = even_exits(6, TINY.blocks)
    ways = mixed.calls(forced, tasks=3, per_task=2, length=8)
    for call in ways.values():
        assert call() == [exit_ for task in range(3) for exit_ in planned[task::3]]


def test_ways_that_do_not_agree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"a call each": lambda: [2, 3], "one pass": lambda: [2, 4]}
    monkeypatch.setattr(mixed, "calls", lambda *_: ways)
    with pytest.raises(RuntimeError, match="do not agree"):
        mixed.measure_cell(build(TINY, [8]), 2, 1, 8, rounds=1)


def test_the_page(tmp_path: Path) -> None:
    page, store = tmp_path / "mixed.md", ["--json", str(tmp_path / "mixed.json")]
    assert mixed.main([*"--sizes tiny --tasks 2 --rows 1 2 --rounds 1 --threads 1 --length 8".split(), *store]) == 0
    assert mixed.main([*store, "--docs", str(page)]) == 0
    lines = [line for line in page.read_text().splitlines() if line.startswith("| tiny")]
    assert [line.split(" | ")[:3] for line in lines] == [["| tiny", "2", "1"], ["| tiny", "2", "2"]]
    assert "python benchmarks/mixed.py --rounds 1 --threads 1\n" in page.read_text()
