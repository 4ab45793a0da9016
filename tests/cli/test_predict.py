"""`badge-peft predict`: texts in, one line of JSON per text out."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from badge_peft import load_pretrained
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.predict import predict
from badge_peft.workflows.stream import read_texts
from tests.cli.conftest import ROWS, Cli, one_line, save_classifier
from tests.texts import make_tokenizer

TEXTS = [text for text, _ in ROWS]


def answers(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_answers_are_the_models_in_the_order_of_the_texts(trained: Path, place: Path, cli: Cli) -> None:
    found = answers(cli("predict", trained, place / "texts.txt", "--batch-size", 7))
    assert [answer["text"] for answer in found] == TEXTS
    assert all(list(answer) == ["text", "label", "score", "exit_layer"] for answer in found)
    model = load_pretrained(str(trained))
    out = model.early_exit_forward(**make_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    assert [answer["exit_layer"] for answer in found] == out.exit_layer.tolist()
    assert len(set(out.exit_layer.tolist())) > 1
    assert [answer["label"] for answer in found] == [("bad", "good")[i] for i in out.logits.argmax(-1)]
    sure = out.logits.softmax(-1).max(-1).values
    assert [answer["score"] for answer in found] == pytest.approx(sure.tolist(), abs=1e-5)


def test_every_format_gives_the_same(trained: Path, place: Path, cli: Cli, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(TEXTS)) + "\n\n"
    )
    with gzip.open(tmp_path / "t.tsv.gz", "wt", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("body", "x"), *((text, 1) for text in TEXTS)])
    expected = cli("predict", trained, place / "texts.txt").stdout
    assert len(expected.splitlines()) == len(TEXTS)
    assert cli("predict", trained, place / "rows.csv").stdout == expected
    assert cli("predict", trained, tmp_path / "t.parquet").stdout == expected
    assert cli("predict", trained, tmp_path / "t.jsonl").stdout == expected
    assert cli("predict", trained, tmp_path / "t.tsv.gz", "--text-column", "body").stdout == expected
    assert cli("predict", trained, input="\n".join(TEXTS)).stdout == expected
    assert cli("predict", trained, "-", "--format", "csv", input=(place / "rows.csv").read_text()).stdout == expected


def test_a_line_in_a_line_out(trained: Path, cli: Cli) -> None:
    found = answers(cli("predict", trained, input='a film\n\n"quoted, é"\r\nthe plot'))
    assert [answer["text"] for answer in found] == ["a film", "", '"quoted, é"', "the plot"]
    assert cli("predict", trained, input="").stdout == ""


def test_overrides(trained: Path, cli: Cli) -> None:
    def exits(*options: Any) -> set[int]:
        return {answer["exit_layer"] for answer in answers(cli("predict", trained, *options, input="\n".join(TEXTS)))}

    assert exits("--policy", "never") == {3}
    assert exits("--policy", "fixed_depth", "--depth", 2) == {2}
    assert exits("--threshold", 0.0) == {1}  # of the adapter's own max_prob
    assert exits("--policy", "divergence", "--threshold", 100, "--patience", 2) == {3}
    assert exits("--policy", "divergence", "--threshold", 100, "--patience", 1) == {2}
    for unread in (("--patience", 2), ("--depth", 1), ("--policy", "never", "--threshold", 0.5)):
        one_line(cli("predict", trained, *unread, input="a film", fails=True), "changes nothing", "--policy")


def test_one_batch_at_a_time_is_read(trained: Path) -> None:
    taken = 0

    def endless() -> Iterator[tuple[str, None]]:
        nonlocal taken
        while True:
            taken += 1
            yield TEXTS[taken % len(TEXTS)], None

    found = predict(open_adapter(trained), endless(), batch_size=4)
    for _ in range(5):
        next(found)
    assert taken == 8


def test_long_texts_are_cut(trained: Path, cli: Cli) -> None:
    long = " ".join(["film"] * 500)
    assert [answer["text"] for answer in answers(cli("predict", trained, input=long))] == [long]


def test_texts_that_training_takes_are_answered(trained: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("text\na film\n" + "a " * 70_000 + "\nthe plot\n")
    assert [len(answer["text"]) for answer in answers(cli("predict", trained, tmp_path / "long.csv"))] == [
        6,
        140_000,
        8,
    ]
    cli("evaluate", trained, tmp_path / "long.csv")
    lines = '{"text": "a film"}\n{"text": "half a pair: \\ud800"}\n{"text": "the plot"}\n'
    found = answers(cli("predict", trained, "--format", "jsonl", "--batch-size", 1, input=lines))
    assert [answer["text"] for answer in found] == ["a film", "half a pair: \ufffd", "the plot"]
    deep = '{"text": "a film"}\n' + "[" * 100_000
    one_line(cli("predict", trained, "--format", "jsonl", input=deep, fails=True), "line 2 is no JSON")


def test_several_labels(cli: Cli, tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "m", ("a", "b", "c"), problem_type="multi_label_classification")
    lines = [json.dumps({"text": text, "label": ["a", "c"] if i % 2 else []}) for i, text in enumerate(TEXTS[:60])]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    train = ("train", model, tmp_path / "d.jsonl", "--output-dir", tmp_path / "a", "--keep-head", "--epochs", 1)
    cli(*train, "--latency", 0, "--policy", "divergence")
    for answer in answers(cli("predict", tmp_path / "a", input="a film\nthe plot\n")):
        assert set(answer["labels"]) <= {"a", "b", "c"} and 0.5 <= answer["score"] <= 1


def test_wrong_input(trained: Path, place: Path, adapter: Path, cli: Cli, tmp_path: Path) -> None:
    rows = place / "rows.csv"
    one_line(cli("predict", place, rows, fails=True), "holds no adapter")
    one_line(cli("predict", trained, tmp_path / "no.txt", fails=True), "no file")
    one_line(cli("predict", trained, rows, "--text-column", "body", fails=True), "'body'", "text, label")
    one_line(cli("predict", trained, trained / "tradeoff.png", fails=True), "--format")
    one_line(cli("predict", trained, rows, "--format", "xml", fails=True), "format='xml'", "jsonl")
    one_line(cli("predict", trained, rows, "--policy", "luck", fails=True), "policy='luck'")
    one_line(cli("predict", trained, rows, "--policy", "agreement", fails=True), "agreement", "calibrate")
    one_line(cli("predict", trained, rows, "--policy", "fixed_depth", fails=True), "depth")
    broken = '{"text": "a film"}\n{oh'
    one_line(cli("predict", trained, "--format", "jsonl", input=broken, fails=True), "line 2")
    one_line(cli("predict", trained, "--format", "jsonl", input='{"text": null}', fails=True), "row 1", "'text'")
    one_line(cli("predict", trained, "--format", "jsonl", input="[1]", fails=True), "line 1")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    one_line(cli("predict", trained, tmp_path / "latin.txt", fails=True), "UTF-8")
    (tmp_path / "bad.parquet").write_bytes(b"PAR")
    one_line(cli("predict", trained, tmp_path / "bad.parquet", fails=True), "parquet")
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    cli("predict", adapter, input="a film\n")  # the base model has one too
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "moved" in cli("predict", adapter, input="a film\n", fails=True).output
    cli("predict", adapter, "--base-model", place / "model", input="a film\n")


def test_columns_are_found_as_they_were_in_training(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("title,body\na,b\n")
    assert list(read_texts(str(tmp_path / "t.csv"), recorded={"text": "body"})) == [("b", None)]
    assert list(read_texts(str(tmp_path / "t.csv"))) == [("a", None)]
    pairs = read_texts(str(tmp_path / "t.csv"), recorded={"text": "title", "text_pair": "body"})
    assert list(pairs) == [("a", "b")]
    with pytest.raises(ValueError, match="trained on pairs"):
        list(read_texts(str(tmp_path / "t.csv"), recorded={"text": "title", "text_pair": "other"}))


def test_as_a_program_of_its_own(trained: Path, tmp_path: Path) -> None:
    """From another folder, with nothing but the adapter's; and a reader that leaves early is no error."""
    program = [sys.executable, "-m", "badge_peft.cli", "predict", str(trained), "--batch-size", "1"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("".join(f"{text}\n" for text in TEXTS).encode())
        process.stdin.flush()
        first = json.loads(process.stdout.readline())  # while its input is still open
        process.stdout.close()
        process.stdin.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 0, errors
    assert first["text"] == TEXTS[0] and "Error" not in errors
    assert torch.get_num_threads() == 1
