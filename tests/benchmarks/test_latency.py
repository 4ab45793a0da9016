"""`benchmarks/latency.py` on a tiny model: every experiment, the exits that it forces, and its verdicts on targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import latency
import pytest
import torch
from common import Results
from latency_parts import memory
from latency_parts.forced import NOBODY, SIZES, Forced, build, even_exits, exits_of
from latency_parts.page import TITLES, page, tables
from latency_parts.runs import Case
from latency_parts.runs import row_of as stored_row
from latency_parts.sessions import has_onnx
from latency_parts.targets import MISSED, OPEN, REACHED, TARGETS, Target, judge
from latency_parts.turns import Timing, against_base

from badge_peft.evaluation import timing

TINY = SIZES["tiny"]


def run(path: Path, *arguments: Any) -> Results:
    """Runs the benchmark in this process; the file of its results."""
    few = ["--sizes", "tiny", "--rounds", 2, "--threads", 1, "--lengths", 8, 16, "--json", path]
    assert latency.main([*map(str, (*few, *arguments))]) == 0
    return Results(path)


@pytest.mark.exhaustive
def test_every_experiment_is_in_the_file_and_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processes whose memory is measured one is real: each takes seconds to import its libraries."""
    child = memory._child
    monkeypatch.setattr(memory, "_child", lambda kind, *x: (child if kind == "mixed" else memory._measure)(kind, *x))
    results = run(tmp_path / "new" / "latency.json")
    measured = [name for name in TITLES if has_onnx() or not ("onnx" in name or "int8" in name)]
    assert list(results) == [f"{name}/tiny/cpu" for name in measured]
    for section in results.values():
        for row in section["rows"]:
            assert row.get("as_forced", True) in (True, None) and row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
    for key in ("exits", "batch", *(["onnx", "onnx-int8", "onnx-batch"] if has_onnx() else [])):
        for row in results[f"{key}/tiny/cpu"]["rows"]:
            assert row["limit_ratio_q1"] <= row["limit_ratio"] <= row["limit_ratio_q3"] and row["outside_p50_ms"] > 0
    assert all(row["peak_mb"] > row["imports_mb"] / 2 > 0 for row in results["memory/tiny/cpu"]["rows"])
    assert latency.main(["--json", str(results.path), "--docs", str(tmp_path / "docs" / "speed.md")]) == 0
    text = (tmp_path / "docs" / "speed.md").read_text()
    where = results["exits/tiny/cpu"]["environment"]
    told = ("ratio to the limit", "the same without its blocks", where["cpu"], where["date"], "2 rounds, 1 threads")
    assert text == page(results) and all(word in text for word in (*TITLES.values(), *told))
    assert "nan" not in text and str(tmp_path) not in text


def test_every_exit_is_forced_and_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    results = run(tmp_path / "latency.json", "--only", "exits")
    rows = results["exits/tiny/cpu"]["rows"]
    left = {(row["variant"], row["mean_exit"]) for row in rows}
    dge, fixed = "leaves by DGE", "leaves at a fixed depth"
    assert left == {*((fixed, k) for k in (1, 2, 3, 4)), *((dge, k) for k in (2, 3, 4))}
    assert all(row["share"] == row["mean_exit"] / TINY.blocks for row in rows)
    first = [row for row in rows if row["length"] == 8]
    results.keep("exits/tiny/cpu", {**results["exits/tiny/cpu"], "rows": first})  # as if it had been stopped
    found = run(tmp_path / "latency.json", "--only", "exits", "batch", "--rounds", 3)
    rows = found["exits/tiny/cpu"]["rows"]
    assert rows[: len(first)] == first and {row["rounds"] for row in rows if row["length"] == 16} == {3}
    mixed = found["batch/tiny/cpu"]["rows"][0]
    assert (mixed["batch"], mixed["forced"], mixed["mean_exit"], mixed["rounds"]) == (8, [2, 3, 4], 3.0, 3)


@pytest.fixture(scope="module")
def forced() -> Forced:
    return build(TINY, (8, 16))


def test_the_first_token_says_where_a_row_leaves(forced: Forced) -> None:
    wanted = even_exits(16, TINY.blocks)
    assert set(wanted) == {2, 3, 4} and wanted != sorted(wanted)
    batch = forced.batch(wanted, 12, seed=7)  # of a length and words that nothing was fitted on
    assert exits_of(forced.model.early_exit_forward(**batch)) == wanted
    alone = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(wanted))]
    assert [exits_of(forced.model.early_exit_forward(**row)) for row in alone] == [[k] for k in wanted]
    assert set(exits_of(forced.model.early_exit_forward(**batch, **NOBODY))) == {TINY.blocks}
    assert forced.stock(**batch).logits.equal(forced.model(**batch).logits)
    with pytest.raises(ValueError, match=r"exits=\[1\] is not allowed: DGE stops at blocks 2 to 4"):
        forced.batch([1, 2], 8)


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that slows down all the time, what takes half of the time still has a ratio of one half."""
    now, order = 0.0, []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += seconds * (1 + now / 100)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    calls = {name: call(name, 0.5) for name in "abcdef"}
    found = against_base(call("base", 1.0), calls, rounds=10, warmup=2)
    assert order[:9] == ["base", "e", "f", "a", "b", "base", "c", "d", "base"]
    assert order.count("base") == 3 * 12 and order.count("a") == 12
    for name in found:
        summary = found[name].summary(0.5)
        assert summary["rounds"] == 10 and summary["ratio"] == pytest.approx(1.0, abs=0.03)
        assert summary["base_p95_ms"] > 1.05 * summary["base_p50_ms"]


def test_a_ratio_is_to_the_share_of_the_blocks_that_ran() -> None:
    timing, call = Timing([3.0, 6.0, 4.0], [6.0, 6.0, 6.0]), lambda: None
    row = stored_row(Case("x", call, [4, 8]), [4, 8], timing, 12)
    assert (row["share"], row["ratio"], row["as_forced"]) == (0.5, pytest.approx(4 / 3), True)
    astray = stored_row(Case("x", call, [3, 8]), [4, 8], timing, 12)
    assert (astray["share"], astray["as_forced"]) == (0.5, False)
    assert "! left at 6.00" in tables("exits", [{"base": "y", "batch": 2, "length": 16, **astray}])[0]
    assert stored_row(Case("x", call, [6], whole=True), [6], timing, 12)["ratio"] == pytest.approx(4 / 6)


def test_the_limit_has_what_is_outside_of_the_blocks_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of 12 blocks of 1 s with 3 s outside of them: leaving at block 6 can take 9 s."""
    now = 0.0

    def call(seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    calls = {str(i): call(9.0) for i in range(6)}
    found = against_base(call(15.0), calls, rounds=3, outside=call(3.0))
    for name in calls:
        assert found[name].outside_seconds == pytest.approx([3.0] * 3)
        summary = found[name].summary(0.5)
        assert (summary["limit_ratio"], summary["ratio"]) == (pytest.approx(1.0), pytest.approx(9 / 7.5))
        assert summary["limit_ratio_q1"] == pytest.approx(1.0) and summary["outside_p50_ms"] == pytest.approx(3000)
    assert "limit_ratio" not in against_base(call(15.0), calls, rounds=1)["0"].summary(0.5)


def test_outside_is_the_stock_model_without_its_blocks(forced: Forced) -> None:
    batch = forced.batch([2, 3], 8)
    embedded = forced.stock.bert.embeddings(batch["input_ids"])
    wanted = forced.stock.classifier(forced.stock.bert.pooler(embedded))
    assert torch.equal(forced.outside(**batch).logits, wanted)
    assert {id(p) for p in forced.outside.parameters()} <= {id(p) for p in forced.model.parameters()} | {
        id(p) for p in forced.stock.parameters()
    }


def row_of(ratio: float, exit: int = 6, length: int = 64, **more: Any) -> dict[str, Any]:
    fields = {"variant": "leaves by DGE", "batch": 1, "length": length, "forced": [exit], "ratio": ratio}
    return {**fields, "mean_exit": exit, "blocks": 12, "share": exit / 12, **more}


TARGET = Target("t", "exits", "h384", 1.05, variant="leaves by DGE", lengths=(64, 128), exits=(2, 12))


def sections_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"exits/h384/cpu": {"rows": list(rows)}}


def test_a_missed_target_is_reported_as_missed() -> None:
    fine, close, bad = row_of(1.0), row_of(1.05, exit=2), row_of(1.051, length=128)
    assert judge(TARGET, sections_of(fine, close)).status == REACHED
    verdict = judge(TARGET, sections_of(fine, close, bad))
    assert (verdict.status, verdict.worst, verdict.of, verdict.missed) == (MISSED, bad, 3, 1)
    astray = row_of(0.9, as_forced=False)
    assert judge(TARGET, sections_of(fine, astray)).status == MISSED


def test_a_target_looks_at_its_own_rows() -> None:
    others = (row_of(9, exit=1), row_of(9, length=16), row_of(9, variant="leaves at a fixed depth"))
    assert judge(TARGET, sections_of(*others)).status == OPEN
    assert judge(TARGET, {"exits/h384/cuda": {"rows": [row_of(1.0)]}}).status == OPEN
    assert judge(TARGET, sections_of(*others, row_of(1.0))).status == REACHED


def test_a_target_may_be_a_least_value() -> None:
    target = Target("t", "exits", "h384", 8.0, value="times_faster", at_least=True)
    fast, slow = row_of(0.1, times_faster=10.0), row_of(0.2, times_faster=5.0)
    assert judge(target, sections_of(fast)).status == REACHED
    assert judge(target, sections_of(fast, slow)).worst == slow
    assert judge(target, sections_of(fast, slow)).status == MISSED


def test_every_target_names_what_there_is() -> None:
    assert {target.experiment for target in TARGETS} == set(TITLES) == set(latency.PLAN)
    assert {target.size for target in TARGETS} == {"BERT-base", "h384"}
