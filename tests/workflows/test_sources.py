"""Csv files as `predict` reads them, row by row, and as training does, alone or in a folder: the same texts, or an
error."""

from __future__ import annotations

from pathlib import Path

import pytest

from badge_peft.workflows.data import read_examples
from badge_peft.workflows.sources import read_source
from badge_peft.workflows.stream import read_texts


@pytest.mark.parametrize(
    "content",
    [
        "\ntext\na film\nthe plot\n",
        "\r\ntext;n\r\na film;1\r\n\r\nthe plot;2\r\n",
        "text,text,text.1\na film,other,third\nthe plot,other,third\n",
        'text,n\n"a film",1\n"the plot",2',
    ],
)
@pytest.mark.filterwarnings("ignore:.*not used")
def test_both_find_the_same_texts(content: str, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_bytes(content.encode())
    assert [text for text, _ in read_texts(str(tmp_path / "f.csv"))] == ["a film", "the plot"]
    assert read_examples(tmp_path / "f.csv").texts == ["a film", "the plot"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\na film, and more\nthe plot\n", "row 1 has 2 values, and the columns are text: .*','.* in quotes"),
        ("text,label\na film,good\nthe plot, and more,good\n", "row 2 has 3 values"),
        ('text,n\na film,1\n"the plot,2\nmore,3\n', "row 2 begins a quote"),
    ],
)
def test_a_row_that_lacks_its_quotes_loses_nothing_in_silence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(str(tmp_path / "f.csv")))
    with pytest.raises(ValueError, match="f.csv cannot be read"):
        read_examples(tmp_path / "f.csv")


@pytest.mark.parametrize(("name", "delimiter"), [("train.csv", ","), ("train.csv", ";"), ("train.tsv", "\t")])
def test_a_folder_is_read_as_its_files(name: str, delimiter: str, tmp_path: Path) -> None:
    """A country, an id with zeros before it, and a text that looks like none."""
    rows = [("NA", "NA", "007"), ("None", "US", "7"), ("a film", "NA", "7")]
    lines = [("text", "label", "note"), *rows]
    (tmp_path / name).write_text("".join(f"{delimiter.join(line)}\n" for line in lines))
    for place in (tmp_path, tmp_path / name):
        found = read_examples(place)
        assert found.texts == ["NA", "None", "a film"] and found.labels == ["NA", "US", "NA"]
        assert read_source(place)["train"]["note"][:] == ["007", "7", "7"]


def test_files_of_a_folder_with_other_columns(tmp_path: Path) -> None:
    (tmp_path / "train-1.csv").write_text("text,label\na,1\n")
    (tmp_path / "train-2.csv").write_text("text;label\nb;1\n")
    assert read_examples(tmp_path).texts == ["a", "b"]
    (tmp_path / "train-2.csv").write_text("text,kind\nb,1\n")
    with pytest.raises(
        ValueError, match="cannot be read: its files have different columns: text, label, and text, kin"
    ):
        read_examples(tmp_path)


def test_a_folder_with_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_source(tmp_path)
