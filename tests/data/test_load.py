"""Labelled texts from files: every format, found or named columns, labels of every kind, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from badge_peft.data import load, load_text_dataset
from tests.texts import write_csv

ROWS = [("a good film", "good"), ("a bad film", "bad"), ("a dull plot, and\nlong", "bad")]


def texts_and_labels(data: Dataset) -> list[tuple[str, str]]:
    names = data.features["label"]
    return [(row["text"], names.int2str(row["label"])) for row in data]


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    dicts = [{"text": text, "label": label} for text, label in rows]
    if path.suffix == ".parquet":
        Dataset.from_list(dicts).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(dicts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in dicts))
    elif path.suffix == ".tsv":
        path.write_text("text\tlabel\n" + "".join(f'"{text}"\t{label}\n' for text, label in rows))
    else:
        write_csv(path, rows)
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format(tmp_path: Path, suffix: str) -> None:
    data = load_text_dataset(write(tmp_path / f"films.{suffix}", ROWS))
    assert list(data) == ["train"]
    assert data["train"].column_names == ["text", "label"]
    assert texts_and_labels(data["train"]) == ROWS
    assert data["train"].features["label"].names == ["bad", "good"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_files(tmp_path: Path, compress: Any) -> None:
    plain = Path(write_csv(tmp_path / "films.csv", ROWS))
    packed = tmp_path / ("films.csv.gz" if compress is gzip.compress else "films.csv.bz2")
    packed.write_bytes(compress(plain.read_bytes()))
    assert texts_and_labels(load_text_dataset(packed)["train"]) == ROWS


def test_a_folder_with_splits(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", ROWS[:1])
    data = load_text_dataset(tmp_path)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "test": 1}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "films.csv", ROWS)
    load_text_dataset(path)
    write_csv(tmp_path / "films.csv", ROWS[:2])
    assert len(load_text_dataset(path)["train"]) == 2


@pytest.mark.parametrize("columns", [("Sentence", "Category"), ("review", "sentiment"), ("anything", "label")])
def test_columns_are_found(tmp_path: Path, columns: tuple[str, str]) -> None:
    assert texts_and_labels(load_text_dataset(write_csv(tmp_path / "f.csv", ROWS, columns))["train"]) == ROWS


def test_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "films.csv"
    path.write_text("text,label,opinion,verdict\nx,1,a good film,good\ny,2,a bad film,bad\n")
    data = load_text_dataset(path, text_column="opinion", label_column="verdict")
    assert texts_and_labels(data["train"]) == ROWS[:2]


def test_rows_without_text_or_label_are_left_out(tmp_path: Path) -> None:
    rows = [*ROWS, ("", "bad"), ("   ", "bad"), ("no label", "")]
    assert texts_and_labels(load_text_dataset(write_csv(tmp_path / "f.csv", rows))["train"]) == ROWS


def test_texts_that_look_like_missing_values_are_texts(tmp_path: Path) -> None:
    rows = [("None", "good"), ("NA", "bad"), ("null", "bad")]
    assert texts_and_labels(load_text_dataset(write_csv(tmp_path / "f.csv", rows))["train"]) == rows


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["3", "10", "3"], ["3", "10"], [0, 1, 0]),  # numbers in the order of numbers
        (["1", "", "0"], ["0", "1"], [1, 0]),  # a hole makes the column a float one
        (["True", "False", "True"], ["False", "True"], [1, 0, 1]),
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        (["-1", "1", "0"], ["0", "1"], [1, 0]),  # -1 is a hidden label
    ],
)
def test_labels_of_every_kind(tmp_path: Path, labels: list[str], names: list[str], expected: list[int]) -> None:
    rows = [(f"text {i}", label) for i, label in enumerate(labels)]
    data = load_text_dataset(write_csv(tmp_path / "f.csv", rows))["train"]
    assert data.features["label"].names == names
    assert list(data["label"]) == expected


def test_wanted_labels_filter_and_order(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "f.csv", [*ROWS, ("a plot", "plot")])
    data = load_text_dataset(path, labels=("good", "bad"))["train"]
    assert data.features["label"].names == ["good", "bad"]
    assert texts_and_labels(data) == ROWS


def test_a_hub_data_set_keeps_its_class_names_and_loses_unlabelled_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(
        {"idx": Value("int64"), "sentence": Value("string"), "label": ClassLabel(names=["neg", "pos"])}
    )

    def rows(labels: list[int]) -> Dataset:
        texts = [f"text {i}" for i in range(len(labels))]
        columns = {"idx": list(range(len(labels))), "sentence": texts, "label": labels}
        return Dataset.from_dict(columns, features=features)

    hub = DatasetDict({"train": rows([1, 1]), "validation": rows([1]), "test": rows([-1, -1])})
    asked: list[tuple[Any, ...]] = []

    def fake(*args: Any) -> DatasetDict:
        asked.append(args)
        return hub

    monkeypatch.setattr(load, "load_dataset", fake)
    data = load_text_dataset("glue", name="sst2")
    assert asked == [("glue", "sst2")]
    assert list(data) == ["train", "validation"]
    assert data["train"].features["label"].names == ["neg", "pos"]
    assert list(data["train"]["label"]) == [1, 1]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("text,label\nx,a\ny,b\n", {"text_column": "body"}, "no text column 'body'.*--text-column.*text, label"),
        ("text,label\nx,a\ny,b\n", {"label_column": "kind"}, "no label column 'kind'.*--label-column"),
        ("one,two,label\nx,y,a\nz,u,b\n", {}, "cannot tell which column holds the texts.*one, two, label"),
        ("text,one,two\nx,y,a\nz,u,b\n", {}, "cannot tell which column holds the labels.*text, one, two"),
        ("text,label\nx,a\ny,a\n", {}, "'label' has 1 different values.*2 to 1000"),
        ("text,label\nx,0.5\ny,1.5\n", {}, "'label' holds float values.*whole numbers"),
        ("text,label\nx,\ny,\n", {}, "no row of .* has both a text"),
        ("text,label\nx,a\ny,b\n", {"labels": ("a", "c")}, r"names 'c', but column 'label' has \['a', 'b'\]"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str, arguments: dict[str, Any], message: str) -> None:
    path = tmp_path / "films.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_text_dataset(path, **arguments)


def test_too_many_labels_to_be_classes(tmp_path: Path) -> None:
    rows = [(f"text {i}", f"label {i}") for i in range(1001)]
    with pytest.raises(ValueError, match="1001 different values"):
        load_text_dataset(write_csv(tmp_path / "f.csv", rows))


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file.*films.csv"):
        load_text_dataset("nowhere/films.csv")
    (tmp_path / "films.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"must end in .csv, .tsv, .json"):
        load_text_dataset(tmp_path / "films.xlsx")
