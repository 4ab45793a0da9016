"""Csv files as `predict` reads them, row by row, and as training does, alone or in a folder: the same texts, or an
error. In chunks: all texts, in order, no query in two of them, and what cannot be read is said by the last."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from badge_peft.workflows.data import read_examples
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.sources import read_source
from badge_peft.workflows.stream import TextFiles, chunks_of, read_texts, texts_of

PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=3)), max_size=12)


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
        ('text,n\na film,1\n"the plot,2\nmore,3\n', "row 2 cannot be read: unexpected end.* begins with a quote"),
        # quotes that mean nothing, as in many tsv files: the second row would be part of the first one's text
        ('text\tlabel\n"He said hello\t0\nShe said "hi"\t1\n', "row 1 cannot be read: .* begins with a quote"),
        ('text,n\na film,1\n"Good", she said,1\n', "row 2 has 3 values"),
        ('text,n\na film,1\n"Good" she said,1\n', "row 2 cannot be read"),
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


@pytest.mark.parametrize(
    ("value", "column"),
    [(b"a film", "text"), ({"en": "a film"}, "text"), (b"a film", "text_pair"), (["a film"], "text_pair")],
)
def test_what_is_no_text_is_not_read_as_one(value: Any, column: str, tmp_path: Path) -> None:
    """Bytes, as older writers of parquet leave them, would be the text "b'a film'"."""
    rows = pa.Table.from_pylist([{"text": "a film", "text_pair": "a plot", column: value}])
    pq.write_table(rows, tmp_path / "f.parquet")
    columns = Columns(text_column="text", text_pair_column="text_pair")
    with pytest.raises(ValueError, match=rf"row 1 has .* in column '{column}'"):
        list(read_texts(str(tmp_path / "f.parquet"), columns=columns))
    with pytest.raises(ValueError, match=rf"row 1 has {type(value).__name__} in column '{column}'.*store texts as"):
        read_examples(tmp_path / "f.parquet", columns)


def test_ids_that_look_like_fractions_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("query_id,query,document,label\n1.1,a,x,0.5\n1.10,a,y,0.50\n")
    rows = read_examples(tmp_path / "f.csv")
    assert rows.queries() == ["1.1", "1.10"] and rows.labels == [0.5, 0.5]
    assert [row[2] for row in read_texts(str(tmp_path / "f.csv"), by_query=True)] == rows.queries()


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


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chunks") / "pairs.jsonl"


def write(file: Path, pairs: list[tuple[str, str]], by_query: bool = False) -> TextFiles:
    file.write_text("".join(json.dumps({"query": a, "document": b}) + "\n" for a, b in pairs), encoding="utf-8")
    return TextFiles([str(file)], {"by_query": by_query})


@given(pairs=PAIRS, size=st.integers(1, 5), by_query=st.booleans())
def test_the_chunks_are_the_file(file: Path, pairs: list[tuple[str, str]], size: int, by_query: bool) -> None:
    pairs = sorted(pairs, key=lambda pair: pair[0]) if by_query else pairs
    chunks = list(chunks_of(write(file, pairs, by_query), 0, size))
    texts = [texts_of(chunk) for chunk in chunks]
    whole = [pair[:2] for part in texts for pair in part]
    read = [tuple(pair) for pair in json.loads(json.dumps(pairs))]
    assert [(a, b.encode("utf-16", "surrogatepass")) for a, b in whole] == [
        (a, b.encode("utf-16", "surrogatepass")) for a, b in read
    ]
    assert [chunk["start"] for chunk in chunks] == [sum(map(len, texts[:i])) for i in range(len(texts))]
    assert [chunk["last"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {(chunk["file"], chunk["error"]) for chunk in chunks} == {(0, "")}
    assert all(len(part) >= size for part in texts[:-1])
    if by_query:
        queries = [a for part in texts for a, _ in groupby(pair[0] for pair in part)]
        assert queries == [a for a, _ in groupby(a for a, _ in pairs)]
    else:
        assert all(len(part) == size for part in texts[:-1]) and len(texts[-1]) <= size


def test_what_cannot_be_read_is_said_last(file: Path) -> None:
    file.write_text('{"text": "a"}\n' * 5 + "{oh\n")
    *good, bad = chunks_of(TextFiles([str(file)]), 0, 2)
    assert [texts_of(chunk) for chunk in good] == [[("a", None)] * 2] * 2
    assert bad["last"] and bad["start"] == 4 and "line 6 is no JSON" in bad["error"] and texts_of(bad) == []
    (gone,) = chunks_of(TextFiles([str(file.with_name("no.csv"))]), 0, 2)
    assert "no file" in gone["error"]
