"""Csv files as `predict` reads them, row by row, and as training does, with pandas: the same texts, or an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from badge_peft.workflows.data import read_examples
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
