"""`badge-peft evaluate`: exits, policy and latency on a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from badge_peft import ExitLogits, collect_exit_logits, evaluate_policy, exit_scores, load_pretrained
from tests.cli.conftest import ROWS, Cli, one_line
from tests.texts import make_tokenizer, write_csv


@pytest.fixture(scope="module")
def logits(trained: Path) -> ExitLogits:
    """What the exits say about the rows, by the library itself."""
    encoded = make_tokenizer()([text for text, _ in ROWS])
    rows = [
        {**{name: values[i] for name, values in encoded.items()}, "labels": ("bad", "good").index(label)}
        for i, (_, label) in enumerate(ROWS)
    ]
    return collect_exit_logits(load_pretrained(str(trained)), rows)


def test_the_numbers_are_those_of_the_library(
    trained: Path, place: Path, cli: Cli, logits: ExitLogits, tmp_path: Path
) -> None:
    files = ("--json", tmp_path / "new" / "e.json", "--save-logits", tmp_path / "l.safetensors")
    told = cli("evaluate", trained, place / "rows.csv", *files, "--latency", 3)
    report = json.loads((tmp_path / "new" / "e.json").read_text())
    scores = exit_scores(logits)
    assert report["per_exit"] == scores.per_exit and report["labels"] == "given"
    assert (report["s_avg"], report["s_best"]) == (scores.avg, scores.best)
    config = load_pretrained(str(trained)).base_model.get_early_exit_config()
    point = evaluate_policy(logits, config)
    early = report["early_exit"]
    assert (early["score"], early["mean_exit"], early["blocks_saved"]) == (
        point.score,
        point.mean_exit,
        point.blocks_saved,
    )
    assert report["latency"]["rows"] == 3 and report["latency"]["full_depth_p50_ms"] > 0
    stored = ExitLogits.load(tmp_path / "l.safetensors")
    assert torch.equal(stored.logits, logits.logits) and torch.equal(stored.labels, logits.labels)
    for word in ("block 3 (full depth)", "S-avg", "S-best", "policy: max_prob", "latency ("):
        assert word in told.output


def test_without_labels_full_depth_is_the_measure(trained: Path, place: Path, cli: Cli, tmp_path: Path) -> None:
    for data in (place / "texts.txt", place / "rows.csv"):
        told = cli("evaluate", trained, data, "--unlabeled", "--json", tmp_path / "e.json")
        report = json.loads((tmp_path / "e.json").read_text())
        assert report["per_exit"][-1] == 1.0 and report["labels"] == "full depth's own answers"
        assert report["early_exit"]["score"] == report["early_exit"]["answers_as_full_depth"]
        assert "accuracy against full depth" in told.output


def test_numbers_are_labels_too(trained: Path, cli: Cli, place: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "n.csv", [(t, str(("bad", "good").index(y))) for t, y in ROWS])
    for name, source in (("n", data), ("s", place / "rows.csv")):
        cli("evaluate", trained, source, "--metric", "macro_f1", "--json", tmp_path / name)
    numbers, strings = (json.loads((tmp_path / name).read_text()) for name in "ns")
    assert numbers["metric"] == "macro_f1" and numbers["per_exit"] == strings["per_exit"]


def test_wrong_input(trained: Path, place: Path, cli: Cli, tmp_path: Path) -> None:
    rows = place / "rows.csv"
    one_line(cli("evaluate", place, rows, fails=True), "holds no adapter", "adapter_config.json")
    one_line(cli("evaluate", place / "nothing", rows, fails=True), "no folder")
    one_line(cli("evaluate", rows, rows, fails=True), "is a file")
    one_line(cli("evaluate", trained, tmp_path / "no.csv", fails=True), "no file")
    one_line(cli("evaluate", trained, rows, "--metric", "f2", fails=True), "metric='f2'", "macro_f1")
    one_line(cli("evaluate", trained, rows, "--device", "moon", fails=True), "device='moon'")
    wrong = write_csv(tmp_path / "wrong.csv", [("a film", "maybe"), ("a plot", "never")])
    one_line(cli("evaluate", trained, wrong, fails=True), "'maybe'", "'bad', 'good'")


def test_another_kind_of_adapter_is_refused(trained: Path, place: Path, cli: Cli, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    told = cli("evaluate", adapter, place / "rows.csv", fails=True)
    assert "BADGE" in told.output and "Traceback" not in told.output
