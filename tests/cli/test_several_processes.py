"""`badge-peft` under `accelerate launch` and `torchrun`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import ROWS, Cli, one_line, save_classifier
from tests.integrations.launch import launch
from tests.texts import write_csv


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, cli: Cli) -> None:
    """`train`, `evaluate` and `predict` by two processes: one report, one folder, one output."""
    model, rows = save_classifier(tmp_path / "model"), write_csv(tmp_path / "rows.csv", ROWS)
    train = ("train", model, rows, "--keep-head", "--epochs", 2, "--latency", 2, "--policy", "max_prob")
    found = launch("badge_peft.cli", *train, "--output-dir", tmp_path / "adapter", by="accelerate")
    numbered = [line[:2] for line in found.stdout.splitlines() if line[:1].isdecimal()]
    assert numbered == ["1.", "2.", "3.", "4."], found.stdout
    assert found.stdout.count("exit rule: ") == 1 and found.stderr.count("training:   0%") == 1
    report = json.loads((tmp_path / "adapter" / "report.json").read_text())
    assert report["processes"] == 2 and report["train_rows"] + report["rows"] == len(ROWS)
    assert report["full_depth_is_checkpoint"]["equal"]

    # predict, from a source that can be read only once
    texts = "".join(f"{text}\n" for text, _ in ROWS[:43])
    predict = ("predict", tmp_path / "adapter", "--batch-size", 4)
    expected = cli(*predict, input=texts).stdout
    assert len(expected.splitlines()) == 43
    assert launch("badge_peft.cli", *predict, input=texts).stdout == expected

    # evaluate: to the last digit
    evaluate = ("evaluate", tmp_path / "adapter", rows, "--batch-size", 7)
    output = cli(*evaluate, "--json", tmp_path / "one.json", "--save-logits", tmp_path / "one.safetensors").stdout
    two = ("--json", tmp_path / "two.json", "--save-logits", tmp_path / "two.safetensors")
    assert launch("badge_peft.cli", *evaluate, *two).stdout == output
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    logits = [load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    assert torch.equal(logits[0]["logits"], logits[1]["logits"])


@pytest.mark.slow
def test_an_error_is_told_once(tmp_path: Path) -> None:
    model, rows = save_classifier(tmp_path / "model"), write_csv(tmp_path / "rows.csv", ROWS)
    train = ("train", model, rows, "--keep-head", "--batch-size", 5, "--output-dir", tmp_path / "adapter")
    found = launch("badge_peft.cli", *train, fails=True)
    assert found.stderr.count("error: ") == 1 and "batch_size=5" in found.stderr and "multiple of 2" in found.stderr
    assert not (tmp_path / "adapter").exists()


def test_what_cannot_be_shared_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    one_line(cli("sweep", tmp_path, fails=True), "sweep is for one process", "2 were started", "train, evaluate")
