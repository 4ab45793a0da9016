"""`badge-peft bench`: an adapter on the user's texts, beside what could be run instead."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from badge_peft import collect_exit_logits, evaluate_policy, exit_scores, load_pretrained
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.bench import bench_adapter
from badge_peft.workflows.data import read_examples
from tests.cli.conftest import FAST, ROWS, Cli, one_line, save_classifier
from tests.export.cuts import one_cut

pytestmark = pytest.mark.usefixtures("one_translation")
TORCH = ["stock PyTorch", "BADGE PyTorch"]
ONNX = ["ONNX Runtime, full depth", "BADGE ONNX", "ONNX Runtime int8, full depth", "BADGE ONNX int8"]
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "badge_peft.export")),
    reason="needs badge-peft[onnx]",
)


def bench(cli: Cli, adapter: Path, data: Path, out: Path, *options: Any) -> tuple[dict[str, Any], str]:
    told = cli("bench", adapter, data, "--json", out / "new" / "b.json", *options).output
    return json.loads((out / "new" / "b.json").read_text()), told


def test_the_answers_are_those_of_the_library(trained: Path, place: Path, cli: Cli, tmp_path: Path) -> None:
    report, told = bench(cli, trained, place / "rows.csv", tmp_path, "--no-onnx", "--rows", 40, "--threads", 1)
    assert (report["rows"], report["threads"], report["num_blocks"], report["labels"]) == (40, 1, 3, "given")
    stock, early = report["results"]
    assert [stock["name"], early["name"]] == TORCH and "ONNX" not in told

    opened = open_adapter(trained)
    rows = opened.read(place / "rows.csv").select(range(40))
    logits = collect_exit_logits(opened.model, opened.encode(rows))
    point = evaluate_policy(logits, load_pretrained(str(trained)).base_model.get_early_exit_config())
    assert (stock["score"], stock["mean_exit"]) == (exit_scores(logits).per_exit[-1], 3.0)
    assert stock["answers_as_full_depth"] == 1.0  # a frozen backbone and its own head
    assert (early["score"], early["mean_exit"]) == (point.score, pytest.approx(point.mean_exit))
    for row in report["results"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["examples_per_s"] > 0
    for word in (*TORCH, "p50 ms per text", "texts/s", "mean exit", "accuracy", "policy: max_prob", "1 threads"):
        assert word in told


def test_overrides_batches_and_no_labels(trained: Path, place: Path, cli: Cli, tmp_path: Path) -> None:
    options = ("--no-onnx", "--rows", 10, "--batch-size", 4, "--threads", 1)
    rule = ("--policy", "fixed_depth", "--depth", 2)
    report, told = bench(cli, trained, place / "texts.txt", tmp_path, *options, *rule)
    stock, early = report["results"]
    assert (report["rule"]["policy"], early["mean_exit"], report["batch_size"]) == ("fixed_depth", 2.0, 4)
    assert stock["score"] is early["score"] is report["labels"] is None
    assert 0 < early["answers_as_full_depth"] <= 1 and "batch of 4" in told
    report, _ = bench(cli, trained, place / "rows.csv", tmp_path, *options, "--threshold", 0.0, "--unlabeled")
    assert report["results"][1]["mean_exit"] == 1.0 and report["labels"] is None


def test_a_base_model_that_training_left_behind_has_no_score(place: Path, cli: Cli, tmp_path: Path) -> None:
    """Its time counts, its answers are not those that anyone would serve."""
    out = tmp_path / "a"
    cli("train", place / "model", place / "rows.csv", "--output-dir", out, "--backbone", "full", *FAST)
    report, told = bench(cli, out, place / "rows.csv", tmp_path, "--no-onnx", "--rows", 8, "--threads", 1)
    stock, early = report["results"]
    assert stock["score"] is stock["answers_as_full_depth"] is None and stock["p50_ms"] > 0
    assert early["score"] is not None and early["answers_as_full_depth"] is not None and " - " in told


def test_regression(cli: Cli, tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "m", ("value",))
    lines = [json.dumps({"text": text, "label": len(text) / 10}) for text, _ in ROWS[:60]]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    cli("train", model, tmp_path / "d.jsonl", "--output-dir", tmp_path / "a", "--keep-head", *FAST)
    options = ("--no-onnx", "--rows", 8, "--threads", 1)
    report, told = bench(cli, tmp_path / "a", tmp_path / "d.jsonl", tmp_path, *options)
    assert report["metric"] == "pearson" and "pearson" in told
    assert report["results"][1]["score"] is not None and report["results"][1]["answers_as_full_depth"] is None


def test_threads_are_as_before_afterwards(trained: Path, place: Path) -> None:
    before = torch.get_num_threads()
    opened = open_adapter(trained, device="cpu")
    report = bench_adapter(opened, read_examples(place / "texts.txt"), limit=3, threads=before + 1, onnx=False)
    assert report["threads"] == before + 1 and torch.get_num_threads() == before


def test_wrong_input(trained: Path, place: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = place / "rows.csv"
    one_line(cli("bench", place, rows, "--no-onnx", fails=True), "holds no adapter")
    one_line(cli("bench", trained, tmp_path / "no.csv", "--no-onnx", fails=True), "no file")
    one_line(cli("bench", trained, rows, "--no-onnx", "--policy", "luck", fails=True), "policy='luck'")
    one_line(cli("bench", trained, rows, "--no-onnx", "--metric", "f2", fails=True), "metric='f2'", "macro_f1")
    with pytest.raises(ValueError, match="limit=0 is not allowed"):
        bench_adapter(open_adapter(trained), read_examples(rows), limit=0, onnx=False)
    monkeypatch.setattr("badge_peft.utils.extras.find_spec", lambda name: None)
    one_line(cli("bench", trained, rows, fails=True), "pip install 'badge-peft[onnx]'", "--no-onnx")


@needs_onnx
@pytest.mark.slow
def test_onnx_runtime_answers_as_pytorch(trained: Path, place: Path, cli: Cli, tmp_path: Path) -> None:
    with one_cut("trained"):
        report, told = bench(cli, trained, place / "rows.csv", tmp_path, "--rows", 20, "--threads", 1)
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == TORCH + ONNX and not report["spinning"]
    for torch_name, onnx_name in zip(TORCH, ONNX[:2], strict=True):
        for field in ("score", "mean_exit", "answers_as_full_depth"):
            assert rows[torch_name][field] == pytest.approx(rows[onnx_name][field]), onnx_name
    for name in ONNX[2:]:  # int8 may round an answer away
        assert rows[name]["answers_as_full_depth"] > 0.5 and 1 <= rows[name]["mean_exit"] <= 3
    assert "without spinning" in told
