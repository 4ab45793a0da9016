"""`--task NAME=ADAPTER`: the commands with many adapters of one base model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, load_pretrained, save_tasks
from badge_peft.export import OnnxTasksModel
from tests.cli.conftest import ROWS, Cli, one_line, save_classifier
from tests.models import shake
from tests.texts import make_tokenizer

pytestmark = pytest.mark.usefixtures("one_translation")
TEXTS = [text for text, _ in ROWS]
NAMES = ("bad", "good")


@pytest.fixture(scope="module")
def tasks(trained: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The trained adapter, and two for the same base model with labels of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds: dict[str, dict[str, Any]] = {
        "length": {"num_labels": 3, "label_names": ["short", "medium", "long"], "exit_layers": [0, 1, 2]},
        "degree": {"num_labels": 1, "problem_type": "regression"},
    }
    for seed, (name, fields) in enumerate(kinds.items()):
        base = AutoModelForSequenceClassification.from_pretrained(place / "model")
        rule = {"policy": "patience", "patience": 1, "threshold": 0.2}
        model: Any = get_peft_model(base, BadgeConfig(r=4, final_exit="exit", early_exit=rule, **fields))
        shake(model.eval(), seed=seed)
        model.save_pretrained(str(folder / name))
    return {"mood": str(trained), **{name: str(folder / name) for name in kinds}}


def options(tasks: dict[str, str]) -> list[str]:
    return [part for name, place in tasks.items() for part in ("--task", f"{name}={place}")]


def lines(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_predict_says_of_each_task_what_predict_says_of_it_alone(
    tasks: dict[str, str], place: Path, cli: Cli, tmp_path: Path
) -> None:
    found = lines(cli("predict", *options(tasks), place / "texts.txt", "--batch-size", 9))
    assert [line["text"] for line in found] == TEXTS
    assert all(list(line) == ["text", "tasks", "blocks"] and list(line["tasks"]) == list(tasks) for line in found)
    make_tokenizer().save_pretrained(tmp_path)
    for name, adapter in tasks.items():
        model = load_pretrained(adapter)
        out = model.early_exit_forward(**make_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
        assert [line["tasks"][name]["exit_layer"] for line in found] == out.exit_layer.tolist()
        if name == "degree":
            assert [line["tasks"][name]["value"] for line in found] == pytest.approx(
                out.logits[:, 0].tolist(), abs=1e-4
            )
        else:
            names = NAMES if name == "mood" else ("short", "medium", "long")
            assert [line["tasks"][name]["label"] for line in found] == [names[i] for i in out.logits.argmax(-1)]
    for line in found:
        assert line["blocks"] == max(answer["exit_layer"] for answer in line["tasks"].values())


def test_a_bundle_and_standard_input(tasks: dict[str, str], place: Path, cli: Cli, tmp_path: Path) -> None:
    expected = cli("predict", *options(tasks), place / "texts.txt").stdout
    folder = save_tasks(load_pretrained(tasks), tmp_path / "bundle", tokenizer=make_tokenizer())
    assert cli("predict", folder, place / "texts.txt").stdout == expected
    assert cli("predict", *options(tasks), input="\n".join(TEXTS)).stdout == expected


def test_overrides_hold_for_all_tasks(tasks: dict[str, str], place: Path, cli: Cli) -> None:
    found = lines(cli("predict", *options(tasks), place / "texts.txt", "--policy", "fixed_depth", "--depth", 1))
    assert {line["blocks"] for line in found} == {1}
    found = lines(cli("predict", *options(tasks), place / "texts.txt", "--threshold", 0.0))
    assert {line["tasks"]["mood"]["exit_layer"] for line in found} == {1}  # others do not read it, or stop nowhere
    one_line(cli("predict", *options(tasks), place / "texts.txt", "--depth", 1, fails=True), "depth=1 changes nothing")


def test_evaluate_reads_each_tasks_labels_from_the_column_of_its_name(
    tasks: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "mood", "length"), *((t, m, "short") for t, m in ROWS)])
    result = cli("evaluate", *options(tasks), tmp_path / "rows.csv", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["adapters"] == tasks and report["rows"] == len(ROWS) and report["num_blocks"] == 3
    given = {name: own["labels"] for name, own in report["tasks"].items()}
    assert given == {"mood": "given", "length": "given", "degree": "full depth's own answers"}
    alone = cli(
        "evaluate", tasks["mood"], tmp_path / "rows.csv", "--label-column", "mood", "--json", tmp_path / "m.json"
    )
    mood = json.loads((tmp_path / "m.json").read_text())
    assert report["tasks"]["mood"]["per_exit"] == pytest.approx(mood["per_exit"], abs=1e-6) and alone
    exits = [load_pretrained(place).early_exit_forward(**_batch()).exit_layer for place in tasks.values()]
    deepest = torch.stack(exits).amax(dim=0).float().mean().item()
    assert report["mean_blocks"] == pytest.approx(deepest)
    assert report["blocks_saved"] == pytest.approx(1 - deepest / 9)
    assert "one pass for 3 tasks" in result.stdout and "degree" in result.stdout


def _batch() -> Any:
    return make_tokenizer()(TEXTS, padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "mood"), ("--task mood is not allowed: it must be NAME=ADAPTER",)),
        (("--task", "a=x", "--task", "a=y"), ("'a' more than once",)),
        (("--task", "a=./nowhere"), ("no folder ./nowhere",)),
        (("adapter", "texts.txt", "--task", "a=x"), ("with --task there is no ADAPTER", "FILE alone")),
        ((), ("there is no adapter: give its folder, or many with --task",)),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], words: tuple[str, ...], cli: Cli) -> None:
    one_line(cli("predict", *arguments, fails=True), *words)


def test_other_base_models_and_what_is_for_one_adapter(
    tasks: dict[str, str], place: Path, cli: Cli, tmp_path: Path
) -> None:
    save_classifier(tmp_path / "model")
    other: Any = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"), BadgeConfig())
    other.save_pretrained(str(tmp_path / "other"))
    mixed = {"mood": tasks["mood"], "other": str(tmp_path / "other")}
    one_line(
        cli("predict", *options(mixed), place / "texts.txt", fails=True), "'mood' is for the base model", "'other'"
    )
    rows = place / "rows.csv"
    one_line(cli("evaluate", *options(tasks), rows, "--latency", 3, fails=True), "--latency", "for one adapter")
    one_line(cli("evaluate", *options(tasks), rows, "--label-column", "x", fails=True), "the column of its name")
    one_line(cli("evaluate", *options(tasks), fails=True), "there is no DATA")


def test_bench_times_one_pass_beside_what_could_be_run_instead(
    tasks: dict[str, str], place: Path, cli: Cli, tmp_path: Path
) -> None:
    result = cli(
        "bench", *options(tasks), place / "texts.txt", "--rows", 3, "--threads", 1, "--json", tmp_path / "b.json"
    )
    report = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in report["results"]] == ["3 full models", "3 calls", "one pass"]
    full, calls, together = (row["blocks"] for row in report["results"])
    assert full == 9 and calls >= together and together <= 3
    assert all(row["p50_ms"] > 0 for row in report["results"]) and list(report["rules"]) == list(tasks)
    assert "blocks per text" in result.stdout


def test_export_writes_one_file_for_all_tasks(tasks: dict[str, str], place: Path, cli: Cli, tmp_path: Path) -> None:
    some, rule = {name: tasks[name] for name in ("mood", "degree")}, ("--policy", "fixed_depth", "--depth", 1)
    result = cli("export", *options(some), tmp_path / "onnx", "--json", tmp_path / "e.json", *rule)
    report = json.loads((tmp_path / "e.json").read_text())
    assert list(report["tasks"]) == list(some) and report["max_difference"] < 1e-4 and "exits at mood" in result.stdout
    found = OnnxTasksModel.from_pretrained(tmp_path / "onnx", threads=1).predict(TEXTS)
    said = lines(cli("predict", *options(some), place / "texts.txt", *rule))
    for line, answer in zip(said, found, strict=True):
        assert {name: own["exit_layer"] for name, own in line["tasks"].items()} == {
            name: own["exit_layer"] for name, own in answer.items()
        }
    one_line(cli("export", *options(some), fails=True), "there is no DIR")
    data = ("--data", place / "rows.csv")
    one_line(cli("export", *options(some), tmp_path / "x", *data, fails=True), "--data is for one adapter")
