"""`predict --engine ray`: each file of a folder answered into one of its own, which is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from badge_peft.integrations.ray import answer_files, cluster
from badge_peft.utils import distributed
from badge_peft.utils.files import replacing
from badge_peft.workflows.predict import Answerer, Answering
from badge_peft.workflows.settings import TextColumns
from badge_peft.workflows.sources import suffix_of
from badge_peft.workflows.stream import FORMATS, TextFiles

_MARK = b"badge_peft"  # in the metadata of an answered file: what answered it
_ROW_GROUP = 65_536


@dataclass
class FolderReport:
    """What was done."""

    files: int = 0
    rows: int = 0
    before: int = 0  # files that had been answered before


def predict_folder(
    folder: str | Path,
    out: str | Path,
    answering: Answering,
    *,
    format: str | None = None,
    columns: TextColumns = TextColumns(),
    workers: int | None = None,
    address: str | None = None,
) -> FolderReport:
    """Answers every file of a folder (csv, tsv, jsonl, parquet or txt, also in folders in it, but for names that start
    with . or _), on Ray: `a.csv` into `a.csv.parquet`, `b.parquet` into `b.parquet`, each with a row for each row, in
    order. Files that have been answered are passed over, so a run that was stopped goes on.

    The folder is within reach of all machines; `out`, which is made, is on this one. `format` is that of all files,
    as for `read_texts`. Without `workers` as many processes answer as the machines have cores (or GPUs); without
    `address` a Ray cluster is started here for this call."""
    if distributed.rank_world()[1] > 1:
        raise ValueError("Ray starts its own processes: call badge-peft predict --engine ray by itself.")
    folder, out = Path(folder), Path(out)
    outputs = _outputs(folder, out, format)
    answerer = Answerer(answering)
    mark = {"answers": answerer.identity, "format": format, "columns": vars(columns)}
    todo = {source: output for source, output in outputs.items() if not _is_answered(source, output, mark)}
    sources = [str(source.resolve()) for source in todo]
    files = TextFiles(sources, {"format": format, "columns": columns, **answerer.reading})
    for number in range(len(todo)):
        _check(files, number)
    report = FolderReport(before=len(outputs) - len(todo))
    if not todo:
        return report
    del answerer  # the processes that answer have their own
    places = list(todo.values())
    with cluster(address, workers), tqdm(total=len(todo), unit="file") as bar:
        with closing(answer_files(files, answering, workers)) as chunks:
            for number, own in groupby(_checked(chunks, files), key=lambda chunk: chunk["file"]):
                places[number].parent.mkdir(parents=True, exist_ok=True)
                for rows in _write(places[number], own, {**mark, "source": _hash(sources[number])}):
                    report.rows += rows
                    bar.set_postfix(rows=report.rows)
                report.files += 1
                bar.update()
    return report


def _outputs(folder: Path, out: Path, format: str | None) -> dict[Path, Path]:
    """Of each file of `folder` where its answers go."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: give one with the files to answer.")
    inside = out.resolve()
    if inside == folder.resolve() or folder.resolve() in inside.parents:
        raise ValueError(f"{out} lies in {folder}, so its files would be answered next time: name a folder elsewhere.")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is no folder: name one for the answers.")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not any(part.startswith((".", "_")) for part in name.parts)]
    if not names:
        raise ValueError(f"{folder} holds no file to answer.")
    found: dict[Path, Path] = {}
    for name in names:
        if format is None and suffix_of(name) != ".txt" and suffix_of(name).lstrip(".") not in FORMATS:
            raise ValueError(
                f"{folder / name} has a format that cannot be read row by row: take it out of the folder, or say with "
                "--format what all files are."
            )
        found[folder / name] = out / (name if name.suffix == ".parquet" else name.with_name(f"{name.name}.parquet"))
    twice = [output for output, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise ValueError(f"the predictions for two files would be called {twice[0]}: rename one of them.")
    return found


def _is_answered(source: Path, output: Path, mark: dict[str, Any]) -> bool:
    """Whether `output` is there, written of the same texts with the same adapter and settings."""
    if not output.exists():
        return False
    try:
        found = (pq.read_schema(output).metadata or {}).get(_MARK)
    except (pa.ArrowInvalid, OSError):
        found = None
    there = {} if found is None else json.loads(found)
    texts = there.pop("source", None)
    what = None
    if there != json.loads(json.dumps(mark)):
        what = "was not written by this command" if found is None else "has answers of another adapter or setting"
    elif texts != _hash(source):
        what = f"has answers of {source} as it was before it was changed"
    if what is not None:
        raise ValueError(f"{output} {what}: name another folder for the answers, or remove it.")
    return True


def _hash(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _check(files: TextFiles, number: int) -> None:
    """Reads the first text of a file: its format and its columns are wrong now, or not at all."""
    try:
        with closing(files.read(number)) as texts:  # type: ignore[type-var]  # a generator
            next(texts, None)
    except ValueError as error:
        raise ValueError(_named(files.paths[number], str(error))) from error


def _checked(chunks: Iterable[dict[str, Any]], files: TextFiles) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        if chunk["error"]:
            raise ValueError(_named(files.paths[chunk["file"]], chunk["error"]))
        yield chunk


def _named(path: str, error: str) -> str:
    return error if path in error else f"{path}: {error}"


def _write(output: Path, chunks: Iterator[dict[str, Any]], mark: dict[str, Any]) -> Iterator[int]:
    """Writes the answers of one file; yields how many rows were added, chunk by chunk."""
    with replacing(output) as temporary, ExitStack() as stack:
        held: list[pa.Table] = []
        writer, rows, written = None, 0, 0
        for chunk in chunks:
            if chunk["start"] != rows:
                raise RuntimeError(f"{output}: after {rows} rows came row {chunk['start']}.")
            table = chunk["table"].replace_schema_metadata({_MARK: json.dumps(mark)})
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(temporary, table.schema))
            held.append(table)
            rows += len(table)
            if chunk["last"] or rows - written >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(held))
                held, written = [], rows
            yield len(table)
            if chunk["last"]:  # what comes next is of another file, whose errors are not this one's
                break
        else:
            raise RuntimeError(f"{output}: the last rows are missing.")
