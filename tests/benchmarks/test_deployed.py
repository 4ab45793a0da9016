"""The page of deployed classifiers: its figures and verdicts, from made-up records."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from common import Results, describe  # noqa: E402
from deployed import collect, main  # noqa: E402
from deployed_parts.page import LADDER, Found, page, read_found  # noqa: E402
from deployed_parts.picture import fixed_depths, points  # noqa: E402


def early(score: float, blocks: float) -> dict[str, Any]:
    return {"score": score, "blocks_saved": blocks, "answers_as_full_depth": 0.97, "expected_time_saved": 0.4}


def adapter(score: float) -> dict[str, Any]:
    own = {**early(score, 0.6), "fixed_depth": early(0.89, 0.5)}
    return {"model": 0.9, "exit_layers": [0, 2], "per_exit": [0.8, 0.9], "drops": {"0.01": own, "0.005": own}}


def clock(saved: float, int8: float) -> dict[str, Any]:
    stock = dict.fromkeys((LADDER[0], LADDER[2]), 10.0) | dict.fromkeys((LADDER[1], LADDER[3]), 10 * (1 - saved))
    return {"one": {**stock, LADDER[4]: 3.0, LADDER[5]: 3.0 / int8}, "batch": stock, "threads": 1}


def made(folder: Path, records: dict[str, Any]) -> str:
    results = Results(folder / "deployed.json")
    for name, record in records.items():
        results.keep(name, {"where": describe(1), **record})
    names = dict.fromkeys(name.split("/")[0] for name in records)
    all_ = [SimpleNamespace(name=n, task=n.split("-")[0], backbone="tiny", own={"title": n}) for n in names]
    return page(read_found(results, all_))


def row(text: str, title: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"| {title}, tiny |")).strip("| ").split(" | ")


def test_values_are_means_with_their_range(tmp_path: Path) -> None:
    records = {f"a-tiny/default{i}": adapter(score) for i, score in enumerate((0.88, 0.9))}
    text = made(tmp_path, {**records, "a-tiny/clock0": clock(0.5, 2.5), "a-tiny/clock1": clock(0.6, 2.5)})
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
    text = made(tmp_path, {"banking77-tiny/default0": adapter(score), "banking77-tiny/clock0": clock(saved, int8)})
    lines = [line for line in text.splitlines() if line.startswith("* ")]
    assert ["n" if "missed" in line else "y" for line in lines] == list(reached)
    assert ("not banking77-tiny" in lines[3]) == (reached[3] == "n")


def test_rivals_stand_beside(tmp_path: Path) -> None:
    rivals = {"full": {"score": 0.9, "ms": 10.0}, "first 1": {"score": 0.85, "ms": 2.0}}
    records = {"a-tiny/rivals": rivals, "a-tiny/linear": {"score": 0.7, "ms": 0.5}}
    text = made(tmp_path, {"a-tiny/default0": adapter(0.9), "a-tiny/plain0": adapter(0.87), **records})
    assert "No times are measured yet." in text
    assert "| 90.0% at 60.0% | 89.0% at 50.0% | 87.0% at 60.0% | 1: 85.0% at 80% | 70.0% |" in text


def test_points_are_times_and_scores_of_each_runtime() -> None:
    scores = dict.fromkeys(LADDER, 0.92) | {LADDER[4]: 0.91, LADDER[5]: None}
    clocks = [{**clock(0.5, 2.0), "scores": scores}, clock(0.7, 2.0)]  # an older record has no scores
    torch, onnx, int8 = points(Found("a", "A", [adapter(0.88), adapter(0.9)], clocks, {}))
    assert torch == onnx == ((10.0, 0.9), (pytest.approx(4.0), pytest.approx(0.89)))
    assert int8 == ((3.0, pytest.approx(0.895)), (1.5, pytest.approx(0.89)))


def test_a_fixed_depth_takes_the_time_of_the_first_blocks() -> None:
    own = {**adapter(0.9), "exit_layers": [0, 1, 2], "per_exit": [0.7, 0.8, 0.9]}
    rivals = {"full": {"ms": 8.0, "int8_ms": 4.0}, "first 1": {"ms": 6.0, "int8_ms": 1.0}}
    torch, onnx, int8 = fixed_depths(Found("a", "A", [own], [clock(0.5, 2.0)], {"rivals": rivals}))
    for line, ms in ((torch, 7.5), (int8, 0.75), (onnx, 5.0)):  # this one was not timed: its share of the blocks
        assert line[0] == pytest.approx((ms, 0.8))
    assert [line[1] for line in (torch, onnx, int8)] == [
        pytest.approx(own) for own in ((10, 0.9), (10, 0.9), (3, 0.9))
    ]


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"where": describe(1), **record}), encoding="utf-8")


def test_records_stay_when_their_folder_is_gone(tmp_path: Path) -> None:
    records, file = tmp_path / "records", tmp_path / "deployed.json"
    write(records / "a-tiny.default0.json", adapter(0.9))
    collect(records, file)
    shutil.rmtree(records)
    write(records / "a-tiny.clock0.json", clock(0.5, 2.0))
    write(records / "a-tiny.default0.json", adapter(0.8))  # made anew
    collect(records, file)
    assert sorted(Results(file)) == ["a-tiny/clock0", "a-tiny/default0"]
    assert Results(file)["a-tiny/default0"]["drops"]["0.01"]["score"] == 0.8


def test_the_picture_is_written_next_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "out" / "records"
    docs = tmp_path / "docs" / "results" / "deployed.md"
    arguments = ["deployed.py", "page", "--out", str(tmp_path / "out"), "--docs", str(docs)]
    arguments += ["--json", str(tmp_path / "deployed.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    for task in ("banking77", "sst2"):
        write(records / f"{task}-minilm.default0.json", adapter(0.89))
    picture = tmp_path / "docs" / "img" / "deployed.svg"
    main()
    assert not picture.exists() and "deployed.svg" not in docs.read_text(encoding="utf-8")

    write(records / "sst2-minilm.clock0.json", clock(0.5, 2.0))
    main()
    assert "](../img/deployed.svg)" in docs.read_text(encoding="utf-8")
    drawn = picture.read_bytes()
    said = " ".join(xml.etree.ElementTree.fromstring(drawn).itertext())
    assert "SST-2, minilm" in said and "BANKING77" not in said
    assert {"with exits", "one depth for all", "ONNX Runtime int8"} <= {part.strip() for part in said.split("\n")}
    main()
    assert picture.read_bytes() == drawn
