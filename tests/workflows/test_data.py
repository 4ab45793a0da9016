"""Texts and labels from files: every format, found or named columns, labels of every kind, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

from badge_peft.workflows import sources
from badge_peft.workflows.columns import PAIR_NAMES
from badge_peft.workflows.data import TextDataset, read_examples, to_examples
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.sources import read_source
from badge_peft.workflows.stream import read_texts
from tests.texts import write_csv

ROWS = [("a good film", "good"), ("a bad film", "bad"), ("a dull plot, and\nlong", "bad")]


def texts_and_labels(examples: TextDataset) -> list[tuple[str, str]]:
    return list(zip(examples.texts, examples.labels or [], strict=True))


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
    examples = read_examples(write(tmp_path / f"films.{suffix}", ROWS))
    assert texts_and_labels(examples) == ROWS
    assert (examples.split, examples.columns) == ("train", {"text": "text", "text_pair": None, "label": "label"})
    assert LabelSet.of_data(examples).names == ["bad", "good"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files(tmp_path: Path, compress: Any, suffix: str) -> None:
    plain = Path(write(tmp_path / f"films.{suffix}", ROWS))
    ending = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    packed = tmp_path / f"films.{suffix}.{ending}"
    packed.write_bytes(compress(plain.read_bytes()))
    assert texts_and_labels(read_examples(packed)) == ROWS


def test_a_folder_with_splits(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", ROWS[:1])
    splits = read_source(tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "test": 1}
    assert len(read_examples(tmp_path)) == 1 and len(read_examples(tmp_path, training=True)) == 3
    assert len(read_examples(tmp_path, Columns(split="train"))) == 3


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "films.csv", ROWS)
    read_examples(path)
    write_csv(tmp_path / "films.csv", ROWS[:2])
    assert len(read_examples(path)) == 2


def test_nothing_is_left_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    read_examples(write_csv(tmp_path / "films.csv", ROWS))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("columns", [("Sentence", "Category"), ("review", "sentiment"), ("anything", "label")])
def test_columns_are_found(tmp_path: Path, columns: tuple[str, str]) -> None:
    assert texts_and_labels(read_examples(write_csv(tmp_path / "f.csv", ROWS, columns))) == ROWS


def test_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "films.csv"
    path.write_text("text,label,opinion,verdict\nx,1,a good film,good\ny,2,a bad film,bad\n")
    examples = read_examples(path, Columns(text_column="opinion", label_column="verdict"))
    assert texts_and_labels(examples) == ROWS[:2]


def test_rows_without_text_are_left_out_and_those_without_label_marked(tmp_path: Path) -> None:
    rows = [*ROWS, ("", "bad"), ("   ", "bad"), ("no label", "")]
    examples = read_examples(write_csv(tmp_path / "f.csv", rows))
    assert examples.texts == [text for text, _ in ROWS] + ["no label"] and (examples.labels or [])[-1] is None
    assert texts_and_labels(examples.labeled()) == ROWS


def test_texts_that_look_like_missing_values_are_texts(tmp_path: Path) -> None:
    rows = [("None", "good"), ("NA", "bad"), ("null", "bad")]
    assert texts_and_labels(read_examples(write_csv(tmp_path / "f.csv", rows))) == rows


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["3", "10", "3"], ["3", "10"], [0, 1, 0]),  # numbers in the order of numbers
        (["1", "", "0"], ["0", "1"], [1, 0]),  # a hole makes the column a float one
        (["True", "False", "True"], ["False", "True"], [1, 0, 1]),
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        (["-1", "1", "0"], ["-1", "0", "1"], [0, 2, 1]),  # -1 is a label like any other
        (["1", "01", "1"], ["01", "1"], [1, 0, 1]),  # a code is no number
        (["1", "1_0", "1"], ["1", "1_0"], [0, 1, 0]),
    ],
)
def test_labels_of_every_kind(tmp_path: Path, labels: list[str], names: list[str], expected: list[int]) -> None:
    rows = [(f"text {i}", label) for i, label in enumerate(labels)]
    examples = read_examples(write_csv(tmp_path / "f.csv", rows)).labeled()
    found = LabelSet.of_data(examples)
    assert found.names == names
    assert found.targets(examples) == expected


def test_minus_one_is_a_hidden_label_where_no_row_has_another(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "f.csv", [("a film", "-1"), ("a plot", "-1")])
    with pytest.warns(UserWarning, match="no row has a label in column 'label'"):
        assert read_examples(path).labels is None


@pytest.mark.parametrize("name", ["rows[1].csv", "rows*.csv", "rows?.jsonl", "rows::1.csv", "a::b/rows.txt"])
def test_a_file_is_opened_by_its_exact_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for file in (name, "rows1.csv", "rowsx.csv", "rowsx.jsonl"):
        write(tmp_path / file, [("the file that was named" if file == name else "another", "good")])
    if name.endswith("txt"):
        (tmp_path / name).write_text("the file that was named\n")
    assert read_examples(tmp_path / name).texts == ["the file that was named"]
    assert [text for text, _ in read_texts(str(tmp_path / name))] == ["the file that was named"]


def test_a_folder_is_opened_by_its_exact_name(tmp_path: Path) -> None:
    for folder in ("rows[1]", "rows1"):
        (tmp_path / folder).mkdir()
        write_csv(tmp_path / folder / "train.csv", [(folder, "good")])
    assert read_examples(tmp_path / "rows[1]").texts == ["rows[1]"]


def test_lines_and_columns_are_told_apart_alike_for_training_and_for_answering(tmp_path: Path) -> None:
    lines = ["a\x0cb", "c\x1cd\x85e", "f\u2028g", "h\ri", "j"]
    (tmp_path / "t.txt").write_bytes("".join(f"{line}\r\n" for line in lines[:3]).encode())
    with (tmp_path / "t.txt").open("ab") as file:
        file.write("\n".join(lines[3:]).encode())
    assert read_examples(tmp_path / "t.txt").texts == lines
    assert [text for text, _ in read_texts(str(tmp_path / "t.txt"))] == lines
    for name, between in (("s.csv", ";"), ("t.csv", "\t"), ("t.tsv", "\t")):
        (tmp_path / name).write_text(f"text{between}label\na, b{between}good\n")
        assert texts_and_labels(read_examples(tmp_path / name)) == [("a, b", "good")]
        assert [text for text, _ in read_texts(str(tmp_path / name))] == ["a, b"]


@pytest.mark.parametrize("names", PAIR_NAMES)
def test_pairs_are_found_by_their_usual_names(tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = names[0].title(), names[1]
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"idx": "7", second: "two", first: "one", "label": "good"}))
    assert (read_examples(path).texts, read_examples(path).pairs) == (["one"], ["two"])
    assert list(read_texts(str(path))) == [("one", "two")]
    alone = read_examples(path, recorded={"text": first, "text_pair": None})  # of an adapter that reads one text
    assert (alone.texts, alone.pairs) == (["one"], None)


def test_a_column_of_texts_that_is_not_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    rows = [{"id": f"n{i}", "text": f"film {i}", "summary": f"it is {i}", "label": "good one"} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"column 'summary'\..*--text-pair-column summary") as told:
        read_examples(path)
    assert len(told) == 1


def test_rows_that_are_left_out_are_counted(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "f.csv", [*ROWS, ("", "bad"), ("no label", "")])
    with pytest.warns(UserWarning) as told:
        found = read_examples(path)
    said = [str(warning.message) for warning in told if warning.category is UserWarning]
    assert "1 of 5 rows have no text" in said[0] and "1 of 4 rows have no label" in said[1]
    assert [found.select([2, 0]).number(i) for i in (0, 1)] == [3, 1]


def test_a_hub_data_set_keeps_its_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(sources, "load_dataset", fake)
    splits = read_source("glue", "sst2")
    assert asked == [("glue", "sst2")]
    train = to_examples(splits["train"], "train", Columns())
    assert train.class_names == ["neg", "pos"] and train.labels == [1, 1]
    with pytest.warns(UserWarning, match="missing or hidden"):
        hidden = to_examples(splits["test"], "test", Columns())
    assert hidden.labels is None and hidden.columns["label"] is None and len(hidden.labeled()) == 0


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("text,label\nx,a\ny,b\n", {"text_column": "body"}, "no text column 'body'.*--text-column.*text, label"),
        ("text,label\nx,a\ny,b\n", {"label_column": "kind"}, "no label column 'kind'.*--label-column"),
        ("text,label\nx,a\ny,b\n", {"text_pair_column": "b"}, "no text-pair column 'b'.*--text-pair-column"),
        ("one,two,label\nx,y,a\nz,u,b\n", {}, "cannot tell which column holds the texts.*one, two, label"),
        ("text,label\n,a\n,b\n", {}, "no row of .* has a text in column 'text'"),
        ("text,label\nx,a\n", {"label_column": "label", "unlabeled": True}, "label_column='label' is not allowed"),
        ("text,label\nx,a\n", {"split": "test"}, "no split 'test': it has train"),
        ("text,label\n", {}, "cannot be read: it has no rows"),
        ("", {}, "cannot be read"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "films.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(path, Columns(**columns))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a"], "'label' has 1 different values.*2 to 1000"),
        ([f"label {i}" for i in range(1001)], "1001 different values"),
        (["", ""], "needs labeled rows.*--label-column"),
    ],
)
def test_labels_that_make_no_classifier(tmp_path: Path, labels: list[str], message: str) -> None:
    rows = [(f"text {i}", label) for i, label in enumerate(labels)]
    with pytest.raises(ValueError, match=message):
        LabelSet.of_data(read_examples(write_csv(tmp_path / "f.csv", rows)))


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    for name in ("nowhere/films.csv", "films.txt", "./films", "/films", "a/b/films"):
        with pytest.raises(FileNotFoundError, match=f"there is no file.*{Path(name).name}"):
            read_examples(name)
    (tmp_path / "films.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"must end in .csv, .tsv, .json"):
        read_examples(tmp_path / "films.xlsx")
    (tmp_path / "latin.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv cannot be read"):
        read_examples(tmp_path / "latin.csv")


def test_tags_that_are_numbers_have_the_names_of_their_data_set_and_hidden_ones_none() -> None:
    tags = Sequence(ClassLabel(names=["NOUN", "VERB"]))
    features = Features({"tokens": Sequence(Value("string")), "upos": tags})
    data = Dataset.from_dict({"tokens": [["a"], ["b", "c"]], "upos": [[1], [-1, -1]]}, features)
    with pytest.warns(UserWarning, match="1 of 2 rows have no label"):
        found = to_examples(data, "test", Columns())
    assert found.words == [["a"], ["b", "c"]] and found.labels == [["VERB"], None]


def test_columns_as_they_were_in_training(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("title,body,extra,label,mark\na,b,c,1,2\n")
    found = read_examples(path, recorded={"text": "body", "text_pair": "extra", "label": "mark"})
    assert (found.texts, found.pairs, found.labels) == (["b"], ["c"], [2])
    assert read_examples(path, recorded={"text": "gone", "label": "gone"}).texts == ["a"]
    with pytest.raises(ValueError, match="trained on pairs of texts.*'gone'.*--text-pair-column"):
        read_examples(path, recorded={"text_pair": "gone"})


def test_a_row_without_a_query_id_belongs_to_the_query_of_its_text() -> None:
    rows = TextDataset(["a", "b", "b", "c"], ["x", "y", "z", "w"], query_ids=["q1", None, "", None])
    assert rows.queries() == ["q1", "b", "b", "c"]
