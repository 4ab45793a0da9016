"""`badge-peft predict --engine ray` with processes killed on the way: is the output that of an undisturbed run?

    python benchmarks/batch_kills.py ADAPTER FOLDER --docs docs/results/batch-scoring.md

FOLDER is answered twice: by `predict` in this process, and on Ray, where after every few chunks one of the processes
that answer gets SIGKILL, in the midst of a chunk where one is. It needs the extra ray, and changes nothing of other
Ray clusters on the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from latency_parts import environment

from badge_peft.workflows import folders
from badge_peft.workflows.answerer import Answerer, Answering
from badge_peft.workflows.chunks import TextFiles

_PATIENCE = 60.0  # seconds in which one of the processes has to be at work


def answering_processes(which: Callable[[str], bool] = bool) -> dict[int, str]:
    """The numbers of those of this process's own Ray, with their titles: what each does now."""
    found: dict[int, str] = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            found[process.pid] = " ".join(process.cmdline())
    return {number: title for number, title in found.items() if title.startswith("ray::MapWorker") and which(title)}


def at_work(title: str) -> bool:
    """Whether a process with this title is answering a chunk: Ray puts the method behind the name."""
    return title.rstrip("() ").endswith(".submit")


def with_kills(engine: Any, kills: int, every: int, seed: int, killed: list[str]) -> Any:
    """`answer_files`, which kills one of the processes after every few chunks, as soon as one is at work; their titles
    are put into `killed`."""
    draw = random.Random(seed)

    def answer_files(*arguments: Any) -> Iterator[dict[str, Any]]:
        for number, chunk in enumerate(engine(*arguments)):
            yield chunk
            if len(killed) < kills and number % every == every - 1:
                end = time.monotonic() + _PATIENCE
                while not (busy := answering_processes(at_work)) and time.monotonic() < end:
                    time.sleep(0.05)
                if not (alive := busy or answering_processes()):
                    continue
                victim = draw.choice(list(alive))
                os.kill(victim, signal.SIGKILL)
                killed.append(alive[victim])

    return answer_files


def differing(folder: Path, out: Path, answering: Answering) -> tuple[int, int, int]:
    """Files, rows, and rows that are not what `predict` says in this process."""
    answerer = Answerer(answering)
    sources = sorted(path for path in folder.rglob("*") if path.is_file())
    files = TextFiles([str(path) for path in sources], recorded=answerer.columns, tokens=answerer.tokens)
    rows = wrong = 0
    for number, source in enumerate(sources):
        expected = answerer.table(list(files.read(number))).to_pylist()
        name = source.relative_to(folder)
        found = pq.read_table(out / name.with_name(f"{name.name}.parquet")).to_pylist()
        rows += len(expected)
        wrong += abs(len(found) - len(expected)) + sum(a != b for a, b in zip(found, expected, strict=False))
    return len(sources), rows, wrong


def page(found: dict[str, Any]) -> str:
    """In Markdown."""
    where = found["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    said = f"{found['wrong']:,} rows differ" if found["wrong"] else "that of an undisturbed run, to the last bit"
    options = " ".join(
        f"--{name.replace('_', '-')} {found[name]}" for name in ("kills", "every", "batch_size", "seed")
    )
    cells = [f"{found[name]:,}" for name in ("workers", "kills", "busy", "files", "rows", "wrong")]
    return f"""# Batch scoring with processes killed

{found["kills"]} processes were killed (SIGKILL), {found["busy"]} of them in the midst of a chunk, while
`badge-peft predict --engine ray` answered {found["files"]} files with {found["rows"]:,} texts. The output: {said}.

| processes at a time | kills | in the midst of a chunk | files | rows | rows that differ | seconds |
| --- | --- | --- | --- | --- | --- | --- |
| {" | ".join(cells)} | {found["seconds"]:.0f} |

The undisturbed run is `predict` in one process. {where["cpu"]}, {where["cores"]} cores, which had other work, too: the
seconds say little. Python {where["python"]}, {versions}.
Chunks are 32 passes of {found["batch_size"]} texts; after every {found["every"]} a process is killed. Made by

```bash
python benchmarks/batch_kills.py ADAPTER FOLDER {options} --docs docs/results/batch-scoring.md
```
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 1 where rows differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("adapter")
    parser.add_argument("folder", type=Path, help="of csv, tsv, jsonl or txt files")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=int, default=4, help="chunks between two kills")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", metavar="FILE", help="write the page")
    options = parser.parse_args(arguments)
    answering, killed, engine = (
        Answering(options.adapter, batch_size=options.batch_size),
        list[str](),
        folders.answer_files,
    )
    where, start = environment.describe(1, "cpu"), time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        folders.answer_files = with_kills(engine, options.kills, options.every, options.seed, killed)
        try:
            folders.predict_folder(options.folder, out, answering, workers=options.workers)
        finally:
            folders.answer_files = engine
        seconds = time.perf_counter() - start
        files, rows, wrong = differing(options.folder, Path(out), answering)
    counts = {"kills": len(killed), "busy": sum(map(at_work, killed)), "files": files, "rows": rows, "wrong": wrong}
    found = {**vars(options), **counts, "seconds": seconds}
    text = page({**found, "environment": where})
    print(text)
    if options.docs:
        Path(options.docs).write_text(text, encoding="utf-8")
    return int(wrong > 0 or len(killed) < options.kills)


if __name__ == "__main__":
    sys.exit(main())
