"""`benchmarks/compiled.py` on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compiled
import pytest
from common import Results
from compiled import BLOCKS, COMPILED, EAGER, OUTSIDE, STOCK, WHOLE, page


def cell(compiled_s: float, exits: tuple[int, ...] = (2, 6)) -> dict[str, Any]:
    """As it is stored: 12 blocks, 1 s each compiled and 2 s not, 3 s outside of them."""
    seconds = {STOCK: 27.0, BLOCKS: 15.0, WHOLE: 14.0, OUTSIDE: 3.0}
    for k in exits:
        seconds |= {EAGER.format(k): 3.0 + 2 * k, COMPILED.format(k): compiled_s + k}
    where = {"cpu": "a cpu", "cores": 2, "threads": 2, "python": "3", "versions": {"torch": "2"}, "date": "now"}
    return {
        "environment": {**where, "load_1min": 0.1},
        "took_s": 9.0,
        "seed": 0,
        "seconds": {name: [value] * 3 for name, value in seconds.items()},
        "first_call_s": dict.fromkeys(seconds, 1.0),
        "as_forced": True,
        "max_difference": 1e-6,
        "rounds": 3,
        "blocks": 12,
        "exits": list(exits),
    }


def test_the_page_says_against_what() -> None:
    text = page({"h384/B=1/S=16": cell(3.0), "h384/B=32/S=16": cell(9.0)})
    assert "| ratio | B=1, S=16 | B=32, S=16 |" in text
    assert "| leaves at block 6: compiled / limit | 1.000 (1.000-1.000) | 1.667 (1.667-1.667) |" in text
    assert "| leaves at block 6: compiled / eager | 0.600 (0.600-0.600) | 1.000 (1.000-1.000) |" in text
    assert "faster than eager ones in 2 of 4 cases: they take 0.60 to 1.57 of the time" in text
    assert "a cpu, 2 cores, 2 threads; Python 3, torch 2; weights of seed 0" in text


def test_an_exit_that_was_not_measured_is_left_open() -> None:
    text = page({"tiny/B=1/S=8": cell(3.0), "tiny/B=1/S=16": cell(3.0, (2,))})
    assert "| leaves at block 6: compiled / limit | 1.000 (1.000-1.000) | - |" in text


def test_there_must_be_something(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="measure first"):
        compiled.main(["--json", str(tmp_path / "none.json"), "--docs", str(tmp_path / "x.md")])


@pytest.mark.exhaustive
def test_a_run_is_stored_cell_by_cell_and_goes_on(tmp_path: Path) -> None:
    store, docs = ["--json", str(tmp_path / "r.json")], tmp_path / "docs" / "compiled.md"
    few = "--sizes tiny --backend eager --rounds 2 --threads 1 --lengths 8 --exits 2 4 --rows".split()
    assert compiled.main([*few, "3", *store]) == 0
    ((key, stored),) = Results(tmp_path / "r.json").items()
    assert key == "tiny/B=3/S=8" and stored["as_forced"] and stored["max_difference"] < 1e-3
    assert {len(seconds) for seconds in stored["seconds"].values()} == {2}
    results = Results(tmp_path / "r.json")
    results.keep("tiny/B=1/S=8", {**stored, "took_s": 7.0})
    assert compiled.main([*few, "1", "3", *store]) == 0  # both are there: nothing is measured again
    assert Results(tmp_path / "r.json") == results
    assert compiled.main([*store, "--docs", str(docs)]) == 0
    assert docs.read_text() == page(results)
