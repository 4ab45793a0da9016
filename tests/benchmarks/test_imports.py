"""`benchmarks/imports.py`: one line per ratio, and a ratio above its bound fails a check."""

from __future__ import annotations

import imports
import pytest


@pytest.mark.parametrize(("times", "fails"), [((2.0, 2.2, 2.4), False), ((2.0, 2.2, 2.6), True)])
def test_lines_and_check(times, fails, monkeypatch, capsys) -> None:
    taken = dict(zip(imports.CODE.values(), times, strict=True))
    monkeypatch.setattr(imports, "cpu_seconds", taken.__getitem__)
    assert imports.main(3) == fails
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "import badge_peft: 2.20 s, ratio 1.100 (1.100-1.100), bound 1.15"
    assert lines[2].startswith("badge-peft --help: ")


def test_the_time_is_that_of_the_process() -> None:
    idle, busy = imports.cpu_seconds("import time; time.sleep(0.3)"), imports.cpu_seconds("sum(range(10_000_000))")
    assert 0 < idle < busy
