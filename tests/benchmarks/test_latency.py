"""`benchmarks/latency.py` on a tiny model: every experiment, the exits that it forces, and its verdicts on targets."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from badge_peft.evaluation import timing

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import latency  # noqa: E402
from latency_parts import memory  # noqa: E402
from latency_parts.forced import NOBODY, Forced, build, exits_of, spread  # noqa: E402
from latency_parts.loop import has_onnx  # noqa: E402
from latency_parts.page import page, targets_text  # noqa: E402
from latency_parts.rows import make_row  # noqa: E402
from latency_parts.settings import EXPERIMENTS, ONNX, SIZES  # noqa: E402
from latency_parts.store import Store, read  # noqa: E402
from latency_parts.tables import ratios, verdicts  # noqa: E402
from latency_parts.targets import MISSED, OPEN, REACHED, TARGETS, Target, judge  # noqa: E402
from latency_parts.turns import Timing, against_base  # noqa: E402

TINY = SIZES["tiny"]
MEASURED = [name for name in EXPERIMENTS if has_onnx() or name not in ONNX]


def run(*arguments: Any) -> str:
    """Runs the benchmark in this process; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert latency.main([*map(str, arguments)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a quick run, beside `cache/`, the files that it exported. Of the processes whose memory is
    measured one is real: each takes seconds to import its libraries."""
    folder = tmp_path_factory.mktemp("latency")
    path, child = folder / "new" / "latency.json", memory._child

    def one_child(kind: str, *shape: Any) -> dict[str, float]:
        return child(kind, *shape) if kind == "mixed" else memory._measure(kind, *shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_child", one_child)
        said = run("--quick", "--threads", 1, "--json", path, "--cache", folder / "cache")
    assert "1 threads" in said and "do not spin" in said and "not measured" in said
    return path


@pytest.mark.exhaustive
def test_every_experiment_is_in_the_file_and_on_the_page(file: Path, tmp_path: Path) -> None:
    data = read(file)
    assert list(data["sections"]) == [f"{name}/tiny/cpu" for name in MEASURED] and data["quick"]
    for section in data["sections"].values():
        assert section["rows"] and section["environment"]["threads"] == 1
        for row in section["rows"]:
            assert row.get("as_forced", True) in (True, None)
            assert row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
    assert str(tmp_path / "docs" / "speed.md") in run("--json", file, "--docs", tmp_path / "docs" / "speed.md")
    text = (tmp_path / "docs" / "speed.md").read_text()
    assert text == page(data)
    for title in EXPERIMENTS.values():
        assert f"## {title}\n" in text
    assert text.count("Not measured.") == len(EXPERIMENTS) - len(MEASURED)
    where = data["sections"]["exits/tiny/cpu"]["environment"]
    for name in ("exits", "batch", *(["onnx", "onnx-int8", "onnx-batch"] if has_onnx() else [])):
        for row in data["sections"][f"{name}/tiny/cpu"]["rows"]:
            assert row["limit_ratio_q1"] <= row["limit_ratio"] <= row["limit_ratio_q3"]
            assert row["outside_p50_ms"] > 0
    for word in (
        "ratio to the limit",
        "the same without its blocks",
        "tiny model",
        where["cpu"],
        f"torch {where['versions']['torch']}",
        where["date"],
        "2 rounds, 1 threads",
    ):
        assert word in text
    assert "nan" not in text and str(file.parent) not in text


@pytest.mark.exhaustive
def test_every_exit_is_forced(file: Path) -> None:
    sections = read(file)["sections"]
    left = {(row["variant"], row["mean_exit"]) for row in sections["exits/tiny/cpu"]["rows"]}
    dge, fixed = "leaves by DGE", "leaves at a fixed depth"
    assert left == {*((fixed, k) for k in (1, 2, 3, 4)), *((dge, k) for k in (2, 3, 4))}
    for row in sections["exits/tiny/cpu"]["rows"]:
        assert row["share"] == row["mean_exit"] / TINY.blocks
    for row in sections["batch/tiny/cpu"]["rows"]:
        assert (row["batch"], row["forced"], row["mean_exit"]) == (4, [2, 3, 4], 3.0)
    for row in sections["memory/tiny/cpu"]["rows"]:
        assert row["peak_mb"] > 0 and row["imports_mb"] > 0  # of several processes, one of which has run other tests


@pytest.mark.exhaustive
def test_a_run_goes_on_where_it_was(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    data = read(file)
    kept = data["sections"]["exits/tiny/cpu"]
    del data["sections"]["full-depth/tiny/cpu"]
    batch = data["sections"]["onnx/tiny/cpu" if has_onnx() else "batch/tiny/cpu"]
    first = [row for row in batch["rows"] if row["length"] == 8]
    batch["rows"], batch["cells"] = list(first), batch["cells"][:1]  # as if it had been stopped behind the first shape
    copy.write_text(json.dumps(data))
    cache = file.parents[1] / "cache"
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.onnx")}
    run("--quick", "--threads", 1, "--json", copy, "--cache", cache, "--resume")
    assert stamps == {path: path.stat().st_mtime_ns for path in cache.rglob("*.onnx")}
    assert bool(stamps) == has_onnx()
    found = read(copy)["sections"]
    assert set(found) == set(read(file)["sections"]) and found["exits/tiny/cpu"] == kept
    if has_onnx():
        assert found["onnx/tiny/cpu"]["rows"][: len(first)] == first
        assert found["onnx/tiny/cpu"]["cells"] == ["S=8", "S=16"]
    run("--quick", "--threads", 1, "--json", copy, "--only", "exits", "--rounds", 3)
    found = read(copy)["sections"]
    assert len(found) == len(MEASURED) and {row["rounds"] for row in found["exits/tiny/cpu"]["rows"]} == {3}
    assert found["batch/tiny/cpu"] == data["sections"]["batch/tiny/cpu"]


@pytest.fixture(scope="module")
def forced() -> Forced:
    return build(TINY, (8, 16))


def test_the_first_token_says_where_a_row_leaves(forced: Forced) -> None:
    wanted = spread(16, TINY.blocks)
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
    timing = Timing([3.0, 6.0, 4.0], [6.0, 6.0, 6.0])
    row = make_row("x", "y", timing, blocks=12, length=16, forced=[4, 8], measured=[4, 8])
    assert (row["share"], row["ratio"], row["as_forced"]) == (0.5, pytest.approx(4 / 3), True)
    astray = make_row("x", "y", timing, blocks=12, length=16, forced=[3, 8], measured=[4, 8])
    assert (astray["share"], astray["as_forced"]) == (0.5, False)
    assert "! left at 6.00" in str(ratios([astray]))
    whole = make_row("x", "y", timing, blocks=12, length=16, forced=[6], measured=[6], whole=True)
    assert whole["ratio"] == pytest.approx(4 / 6)


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
    assert (verdict.status, verdict.worst, verdict.of, verdict.missed) == (MISSED, bad, 3, [bad])
    told = verdicts([verdict])[1][0]
    assert told[-1] == "missed in 1 of 3 rows" and "1.051" in told[-2] and "S=128" in told[-2]
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
    assert {target.experiment for target in TARGETS} == set(EXPERIMENTS)
    assert {target.size for target in TARGETS} == {"BERT-base", "h384"}
    assert targets_text({"sections": {}}).count("not measured") == len(TARGETS)


def test_results_of_two_kinds_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Store(path, quick=True).add("exits/tiny/cpu", {"rows": []})
    assert Store(path, quick=True).sections and not Store(path, quick=False, keep=False).sections
    with pytest.raises(ValueError, match="holds results of --quick"):
        Store(path, quick=False)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not of this benchmark"):
        read(path)
    with pytest.raises(FileNotFoundError, match="measure first"):
        read(tmp_path / "none.json")


def test_it_is_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["latency.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(BENCHMARKS / "latency.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert all(name in said for name in EXPERIMENTS)


def test_a_wrong_option_names_what_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, word in (("--only", "exit", "onnx-batch"), ("--sizes", "huge", "h384"), ("--rounds", "0", "1")):
        with pytest.raises(SystemExit):
            latency.main([option, value])
        told = capsys.readouterr().err
        assert f"{value}" in told and "not allowed" in told and word in told
