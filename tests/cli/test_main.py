"""The command line: help, version, and errors told in one line."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from badge_peft import __version__
from badge_peft.cli import main as cli
from badge_peft.cli.commands import COMMANDS
from badge_peft.workflows import demo
from badge_peft.workflows.settings import (
    DemoSettings,
    ExitOptions,
    Goal,
    SearchOptions,
    TrainColumns,
    TrainingOptions,
    TrainSettings,
)
from tests.cli.conftest import invoke
from tests.texts import sentences, write_csv


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output.strip()) == (0, f"badge-peft {__version__}")


@pytest.mark.parametrize("arguments", [("--help",), ()])
def test_help_lists_the_commands(arguments: tuple[str, ...]) -> None:
    output = invoke(*arguments).output
    assert all(command.__name__ in output for command in COMMANDS)


def test_options_reach_the_demo_and_defaults_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DemoSettings] = []
    monkeypatch.setattr("badge_peft.workflows.demo.run_demo", lambda settings: seen.append(settings))
    assert invoke("demo").exit_code == 0
    given = ["--model", "m", "--dataset", "d", "--text-column", "t", "--label-column", "l", "--dataset-config", "c"]
    given += ["--output-dir", "o", "--epochs", "7", "--max-train", "8", "--max-eval", "9", "--max-length", "10"]
    given += ["--max-score-drop", "0.25", "--seed", "11"]
    assert invoke("demo", *given).exit_code == 0
    default = DemoSettings()
    assert {f.name: str(getattr(seen[0], f.name)) for f in fields(default)} == {
        f.name: str(getattr(default, f.name)) for f in fields(default)
    }
    assert seen[1] == DemoSettings(
        model="m", dataset="d", text_column="t", label_column="l", dataset_config="c", output_dir=Path("o"), epochs=7,
        max_train=8, max_eval=9, max_length=10, max_score_drop=0.25, seed=11,
    )  # fmt: skip


def test_errors_are_one_line(tmp_path: Path) -> None:
    result = invoke("demo", "--dataset", str(tmp_path / "nowhere.csv"))
    assert result.exit_code == 1
    assert result.stderr.strip() == f"error: there is no file {tmp_path / 'nowhere.csv'}."
    data = write_csv(tmp_path / "films.csv", sentences(20))
    result = invoke("demo", "--dataset", data, "--text-column", "body")
    assert result.exit_code == 1
    assert "no text column 'body'" in result.stderr and "Traceback" not in result.stderr
    result = invoke("demo", "--dataset", data, "--model", str(tmp_path / "nowhere"))
    assert result.exit_code == 1 and "error:" in result.stderr


@pytest.mark.parametrize("option", [("--epochs", "0"), ("--epochs", "many"), ("--nonsense", "1")])
def test_wrong_options(option: tuple[str, str]) -> None:
    result = invoke("demo", *option)
    assert result.exit_code == 2
    assert option[0].strip("-") in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: DemoSettings) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(demo, "_read", broken)
    with pytest.raises(KeyError):
        invoke("demo")


def test_the_traceback_of_an_error_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BADGE_PEFT_DEBUG", "1")
    told = invoke("demo", "--dataset", str(tmp_path / "nowhere.csv")).stderr
    assert "Traceback" in told and "sources.py" in told and told.splitlines()[-1].startswith("error: there is no file")


def test_without_cyclopts_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "pip install 'badge-peft[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("train", (TrainSettings, TrainColumns, ExitOptions, TrainingOptions, SearchOptions, Goal)),
        ("demo", (DemoSettings,)),
    ],
)
def test_every_field_of_the_settings_is_an_option(command: str, groups: tuple[Any, ...]) -> None:
    """And its help is its line of the docstring."""
    names = {field.name for group in groups for field in fields(group)}
    names -= {"columns", "exits", "training", "goal", "search"}
    names = {"for" if name == "search_for" else name for name in names}  # `for` is no name in Python
    shown = invoke(command, "--help").stdout
    value = "( [A-Z]+| --no-[a-z-]+)?"
    options = {name: f"--{name.replace('_', '-')}" for name in names}
    without = [name for name, option in options.items() if not re.search(rf"{option}{value}  +[\w]", shown)]
    assert without == []


def test_a_misspelled_option_is_no_file() -> None:
    result = invoke("predict", "adapter", "--treshold", "0.5")
    assert result.exit_code == 2 and "--treshold" in result.stderr and "badge-peft predict --help" in result.stderr
