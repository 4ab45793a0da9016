"""`badge-peft` by several processes, as `accelerate launch` starts them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from badge_peft.utils import distributed
from tests.cli.conftest import ROWS, Cli, Result, one_line, save_classifier
from tests.cli.launched import main as run_commands
from tests.integrations.launch import fork, launch
from tests.texts import write_csv


@pytest.mark.slow
@pytest.mark.parametrize(
    "by",
    [
        pytest.param("fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="safe on Linux alone")),
        pytest.param("accelerate", marks=pytest.mark.exhaustive),
    ],
)
def test_the_command_line(by: str, tmp_path: Path, cli: Cli) -> None:
    """`train`, `evaluate` and `predict` by two processes: one report, one folder, one output, errors told once."""
    model, rows = save_classifier(tmp_path / "model"), write_csv(tmp_path / "rows.csv", ROWS)
    adapter, refused = tmp_path / "adapter", tmp_path / "refused"
    train = ("train", model, rows, "--keep-head", "--epochs", 2, "--latency", 2, "--policy", "max_prob")
    wrong = ("train", model, rows, "--keep-head", "--batch-size", 5, "--output-dir", refused)
    predict = ("predict", adapter, "--batch-size", 4)
    evaluate = ("evaluate", adapter, rows, "--batch-size", 7)
    one, two = (
        ("--json", tmp_path / f"{name}.json", "--save-logits", tmp_path / f"{name}.safetensors")
        for name in ("one", "two")
    )
    texts = "".join(f"{text}\n" for text, _ in ROWS[:43])
    found, silent = launched(
        by, tmp_path, (*train, "--output-dir", adapter), predict, (*evaluate, *two), wrong, input=texts
    )
    assert [result.exit_code for result in found] == [result.exit_code for result in silent] == [0, 0, 0, 1]
    assert {result.output for result in silent} == {""}
    trained, predicted, evaluated, error = found

    numbered = [line[:2] for line in trained.stdout.splitlines() if line[:1].isdecimal()]
    assert numbered == ["1.", "2.", "3.", "4."], trained.stdout
    assert trained.stdout.count("\npolicy: ") == 1 and trained.stderr.count("training:   0%") == 1
    report = json.loads((adapter / "report.json").read_text())
    assert report["processes"] == 2 and report["train_rows"] + report["rows"] == len(ROWS)
    assert report["full_depth_is_checkpoint"]["equal"]

    # predict, from a source that can be read only once
    assert predicted.stdout == cli(*predict, input=texts).stdout
    assert len(predicted.stdout.splitlines()) == 43

    # evaluate: to the last digit
    assert evaluated.stdout == cli(*evaluate, *one).stdout
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    logits = [load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    assert torch.equal(logits[0]["logits"], logits[1]["logits"])

    one_line(error, "batch_size=5", "multiple of 2")
    assert not refused.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="safe on Linux alone")
def test_an_error_of_one_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first, which tells those of all, has none."""

    def full(*arguments: Any, **options: Any) -> None:
        if distributed.rank_world()[0] == 1:
            raise OSError("no space left")

    monkeypatch.setattr("badge_peft.workflows.train.train_adapter", full)
    main_fails = distributed.main_fails
    monkeypatch.setattr(distributed, "main_fails", lambda: main_fails(0.5))
    found, other = launched("fork", tmp_path, ("train", "model", "rows.csv"), input="")
    assert (found[0].exit_code, found[0].output) == (0, "")
    assert (other[0].exit_code, other[0].output) == (1, "error in process 1 alone: no space left\n")


def launched(by: str, folder: Path, *commands: tuple[Any, ...], input: str) -> list[list[Result]]:
    """What each of two processes printed at each of the commands."""
    file = folder / "commands.json"
    file.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    if by == "fork":
        fork(run_commands, file, folder, input=input)
    else:
        launch("tests.cli.launched", file, folder, by=by, input=input)
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    results = [[Result(**result) for result in one["results"]] for one in told]
    for one, of in zip(told, results, strict=True):
        assert one["ends"] == sum(result.exit_code == 0 for result in of)  # nobody is left behind
    return results


def test_what_cannot_be_shared_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    one_line(cli("sweep", tmp_path, fails=True), "sweep is for one process", "2 were started", "train, evaluate")
