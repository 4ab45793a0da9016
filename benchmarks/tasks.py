"""Many tasks on the same rows, in one pass: against a stock model for each, and a call for each, in PyTorch and ONNX.

    python benchmarks/tasks.py                                   # about half an hour on 2 free cores
    python benchmarks/tasks.py --resume                          # what the file of the results does not have yet
    python benchmarks/tasks.py --engines torch --sizes h384 --tasks 8 --shapes 1x64@30
    python benchmarks/tasks.py --docs docs/results/tasks.md      # measures nothing: the page from the file

Results are saved as each cell ends. `benchmarks/stack.py` puts those of real tasks into the same file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from latency_parts.environment import describe
from latency_parts.forced import Forced, build
from latency_parts.settings import SIZES
from latency_parts.store import Store, read
from latency_parts.turns import against_base
from task_parts.page import write_page
from task_parts.ways import DEEPEST, EACH, ENGINES, ONE_PASS, STOCK, Call, OnnxWays, TorchWays, stops

RESULTS = "runs/tasks.json"
_LENGTHS = (64, 256)  # on which the exits are always fitted, so that files of one run serve the next


class Shape(NamedTuple):
    """Rows of a batch, tokens of each row, and how often everything takes its turn."""

    rows: int
    length: int
    rounds: int = 20

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`1x64` or `1x64@20`."""
        shape, _, rounds = text.partition("@")
        rows, _, length = shape.partition("x")
        return cls(int(rows), int(length), int(rounds or 20))

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}@{self.rounds}"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.docs is not None:
        print(write_page(read(options.json), options.docs))
        return 0
    torch.set_num_threads(options.threads)
    store = Store(options.json, quick=options.sizes == ["tiny"], keep=options.resume)
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.sizes:
            lengths = sorted({*_LENGTHS, *(shape.length for shape in options.shapes)})
            forced = build(SIZES[name], lengths, carry=options.carry)
            called = f"{name}, carry" if options.carry else name
            for engine in options.engines:
                _measure_all(forced, called, engine, options, store, Path(options.cache or temporary) / called)
    return 0


def _measure_all(
    forced: Forced, name: str, engine: str, options: argparse.Namespace, store: Store, folder: Path
) -> None:
    """Every cell of one engine and size that the store lacks."""
    key = f"{engine}/{name}"
    section = store.sections.get(key, {"environment": describe(options.threads, "cpu"), "rows": []})
    known = {(row["rows"], row["length"], row["tasks"]) for row in section["rows"]}
    left = [(shape, n) for shape in options.shapes for n in options.tasks if (*shape[:2], n) not in known]
    if not left:
        return
    ways = TorchWays(forced) if engine == "torch" else OnnxWays(forced, folder, options.threads, engine == "int8")
    for shape, tasks in left:
        row = measure(ways.calls(tasks, *shape[:2]), tasks, shape, forced.size.blocks)
        section["rows"].append(row)
        store.add(key, section)
        print(f"{key} {shape} {tasks} tasks: {row['ratio'][ONE_PASS][1]:.3f} of the deepest alone", flush=True)


def measure(calls: dict[str, Call], tasks: int, shape: Shape, blocks: int) -> dict[str, Any]:
    """One cell: milliseconds of each way, its time over that of the deepest task alone, and over that of one pass;
    quartiles over the rounds.

    Raises:
        RuntimeError: a task does not stop where it should.
    """
    planned = [[m] * shape.rows for m in stops(tasks, blocks)]
    for name in (DEEPEST, ONE_PASS, EACH):
        found, wanted = calls[name](), planned[-1:] if name == DEEPEST else planned
        if found != wanted:
            raise RuntimeError(f"{name}: the tasks stop at {found} and should at {wanted}")
    others = {name: call for name, call in calls.items() if name != DEEPEST}
    with torch.inference_mode():
        timed = against_base(calls[DEEPEST], others, shape.rounds, warmup=2 if shape.rounds > 5 else 1)
    seconds = {name: np.asarray(timing.seconds) for name, timing in timed.items()}
    seconds[STOCK] = seconds[STOCK] * tasks  # one after another
    deepest = {name: np.asarray(timing.base_seconds) for name, timing in timed.items()}
    return {
        "rows": shape.rows,
        "length": shape.length,
        "tasks": tasks,
        "rounds": shape.rounds,
        "ms": {DEEPEST: _quartiles(1e3 * deepest[ONE_PASS])} | {k: _quartiles(1e3 * x) for k, x in seconds.items()},
        "ratio": {name: _quartiles(x / deepest[name]) for name, x in seconds.items()},
        "gain": {name: _quartiles(x / seconds[ONE_PASS]) for name, x in seconds.items() if name != ONE_PASS},
    }


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(np.quantile(values, q)) for q in (0.25, 0.5, 0.75)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shapes = [Shape(1, 64), Shape(1, 256), Shape(32, 64, 5), Shape(32, 256, 3)]
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["BERT-base", "h384"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers of tasks")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=Shape.parse,
        default=shapes,
        metavar="ROWSxTOKENS[@ROUNDS]",
        help=f"default: {' '.join(map(str, shapes))}",
    )
    parser.add_argument("--carry", choices=["logits"], help="of the exits (default: each stands alone)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and of each session")
    parser.add_argument("--json", default=RESULTS, help=f"the file of the results (default: {RESULTS})")
    parser.add_argument("--resume", action="store_true", help="measure only what the file does not have")
    parser.add_argument("--cache", metavar="FOLDER", help="keep exported ONNX files here; what is there is used")
    parser.add_argument("--docs", metavar="FILE", help="measure nothing: write the page from the file of the results")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
