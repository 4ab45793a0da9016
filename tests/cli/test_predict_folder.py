"""`badge-peft predict --engine ray` without Ray: a file for each file, whole or not at all; a run that goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from badge_peft.utils import extras
from badge_peft.workflows import folders
from badge_peft.workflows.folders import predict_folder
from badge_peft.workflows.predict import Answering
from badge_peft.workflows.settings import PolicyOverrides, TextColumns
from tests.cli.conftest import ROWS, Cli, one_line

TEXTS = [text for text, _ in ROWS]
pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture
def folder(tmp_path: Path, place: Path) -> Path:
    """Texts in every format, in a folder in the folder, and in none."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    shutil.copy(place / "rows.csv", folder / "a.csv")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:9]))
    pq.write_table(pa.table({"text": TEXTS[:30], "n": range(30)}), folder / "more" / "c.parquet")
    (folder / "d.txt").write_text("")
    (folder / "_SUCCESS").write_text("")
    (folder / "more" / ".hidden").write_text("")
    return folder


def answers(file: Path) -> list[dict[str, Any]]:
    return pq.read_table(file).to_pylist()


def test_each_file_has_the_answers_of_predict(folder: Path, trained: Path, cli: Cli, tmp_path: Path) -> None:
    report = predict_folder(folder, tmp_path / "out" / "deep", Answering(str(trained), batch_size=7))
    assert (report.files, report.rows, report.before) == (4, len(TEXTS) + 9 + 30, 0)
    expected = [json.loads(line) for line in cli("predict", trained, folder / "a.csv").stdout.splitlines()]
    out = tmp_path / "out" / "deep"
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        *("a.csv.parquet", "b.jsonl.parquet", "d.txt.parquet", "more/c.parquet")
    }
    for name, count in {"a.csv.parquet": len(TEXTS), "b.jsonl.parquet": 9, "more/c.parquet": 30}.items():
        found = answers(out / name)
        assert [(row["text"], row["label"], row["exit_layer"]) for row in found] == [
            (row["text"], row["label"], row["exit_layer"]) for row in expected[:count]
        ]
        assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected[:count]], abs=1e-5)
    assert answers(out / "d.txt.parquet") == []
    schemas = {pq.read_schema(path).remove_metadata() for path in out.rglob("*.parquet")}
    assert len(schemas) == 1  # also that of no rows


def test_many_tasks(folder: Path, trained: Path, cli: Cli, tmp_path: Path) -> None:
    predict_folder(folder, tmp_path / "out", Answering({"a": str(trained), "b": str(trained)}))
    lines = cli("predict", "--task", f"a={trained}", "--task", f"b={trained}", folder / "b.jsonl").stdout.splitlines()
    assert answers(tmp_path / "out" / "b.jsonl.parquet") == [json.loads(line) for line in lines]


def test_a_run_that_was_stopped_goes_on(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, answering, engine = tmp_path / "out", Answering(str(trained), batch_size=8), folders.answer_files

    def stops(*arguments: Any) -> Iterator[dict[str, Any]]:
        for chunk in engine(*arguments):
            yield chunk
            if chunk["file"] == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folders, "answer_files", stops)
        predict_folder(folder, out, answering)
    found = {path.name for path in out.rglob("*") if path.is_file()}
    assert found == {"a.csv.parquet", "b.jsonl.parquet", "d.txt.parquet"}  # and no half of the last
    before = (out / "a.csv.parquet").stat().st_mtime_ns
    report = predict_folder(folder, out, answering)
    assert (report.before, report.files, report.rows) == (3, 1, 30)
    assert (out / "a.csv.parquet").stat().st_mtime_ns == before
    again = predict_folder(folder, out, answering)
    assert (again.before, again.files, again.rows) == (4, 0, 0)
    with pytest.raises(ValueError, match=r"a.csv.parquet has answers of another adapter or setting: name another"):
        predict_folder(folder, out, Answering(str(trained), PolicyOverrides(policy="never")))
    texts = (folder / "b.jsonl").read_text()
    (folder / "b.jsonl").write_text(f'{texts}{{"text": "one more"}}\n')
    with pytest.raises(ValueError, match=r"b.jsonl.parquet has answers of .*b.jsonl as it was before .*remove it"):
        predict_folder(folder, out, answering)
    (folder / "b.jsonl").write_text(texts)  # at another time: what is in it counts
    assert predict_folder(folder, out, answering).before == 4
    (out / "a.csv.parquet").write_bytes(b"PAR")
    with pytest.raises(ValueError, match="was not written by this command"):
        predict_folder(folder, out, answering)


def test_a_row_too_few_is_no_file(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, answering, engine = tmp_path / "out", Answering(str(trained), batch_size=8), folders.answer_files
    losses = {"after 16 rows came row 32": lambda i: i == 1, "the last rows are missing": lambda i: i > 1}
    for message, lost in losses.items():
        monkeypatch.setattr(
            folders, "answer_files", lambda *a, lost=lost: (c for i, c in enumerate(engine(*a)) if not lost(i))
        )
        with pytest.raises(RuntimeError, match=message):
            predict_folder(folder, out, answering)
        assert list(out.iterdir()) == []


def test_a_row_without_a_text_ends_the_run_and_is_named(folder: Path, trained: Path, tmp_path: Path) -> None:
    with (folder / "b.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl: row 10 has no value in column 'text'"):
        predict_folder(folder, tmp_path / "out", Answering(str(trained)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.csv.parquet"]


def test_what_is_wrong_is_said_before_anything_is_answered(
    folder: Path, trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "answer_files", None)
    answering, out = Answering(str(trained)), tmp_path / "out"

    def refused(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            predict_folder(*arguments, **options)
        assert not out.exists()

    refused(NotADirectoryError, "no is no folder", tmp_path / "no", out, answering)
    refused(NotADirectoryError, "a.csv is no folder", folder / "a.csv", out, answering)
    refused(NotADirectoryError, "a.csv is no folder: name one", folder / "more", folder / "a.csv", answering)
    refused(ValueError, "lies in", folder, folder / "out", answering)
    refused(ValueError, "lies in", folder, folder, answering)
    refused(
        ValueError,
        r"a\.csv: there is no text column 'body'",
        folder,
        out,
        answering,
        columns=TextColumns(text_column="body"),
    )
    refused(ValueError, "no adapter", folder, out, Answering(str(folder)))
    refused(ValueError, "luck", folder, out, Answering(str(trained), PolicyOverrides(policy="luck")))
    shutil.copy(folder / "a.csv", folder / "a.csv.parquet")
    refused(ValueError, "two files would be called .*a.csv.parquet", folder, out, answering)
    (folder / "a.csv.parquet").rename(folder / "notes.md")
    refused(ValueError, r"notes\.md has a format", folder, out, answering)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_x.csv").write_text("")
    refused(ValueError, "holds no file", tmp_path / "empty", out, answering)

    one_line(cli("predict", trained, folder, out, fails=True), "--engine ray")
    one_line(cli("predict", trained, folder, "--workers", 2, fails=True), "--engine ray")
    one_line(cli("predict", trained, folder, out, "--engine", "dask", fails=True), "engine='dask'", "ray")
    with_task = ("predict", "--task", f"a={trained}", trained, folder, out, "--engine", "ray")
    one_line(cli(*with_task, fails=True), "there is no ADAPTER", "FOLDER and OUT")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    one_line(cli("predict", trained, folder, out, "--engine", "ray", fails=True), "pip install 'badge-peft[ray]'")
