"""Many tasks on the same rows, in one pass: against a stock model for each, and a call for each, in PyTorch and ONNX.

    python benchmarks/tasks.py                                   # about half an hour on 2 free cores
    python benchmarks/tasks.py --engines torch --sizes h384 --tasks 8 --shapes 1x64@30
    python benchmarks/tasks.py --docs docs/results/tasks.md      # measures nothing: the page from the file

Results are saved as each cell ends. `benchmarks/stack.py` puts those of real tasks into the same file.

Each task has an adapter whose exits are sure of their answer from one block on, whatever the row, and so stops at the
block after it: these are spread evenly from 2 to M. All decide at every exit (DGE), alone and together. In ONNX
Runtime one file of one adapter stands for the files of all: there the first token of a row says where it stops.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Results, describe, machine, markdown, parser, quartiles, run, verdict
from latency_parts.forced import SIZES, SURE, Forced, add_copy, build, exits_of
from latency_parts.sessions import Sessions, to_numpy
from latency_parts.turns import against_base
from stack import RESULTS, stack_section

ONE_PASS = "one pass"
DEEPEST = "deepest alone"
EACH = "a call each"
STOCK = "stock models"
ENGINES = {"torch": "PyTorch", "onnx": "ONNX Runtime", "int8": "ONNX Runtime, int8"}
#: What the deepest task alone may be exceeded by, and where: model, rows, tokens, tasks.
TARGETS = {"torch": 1.15, "onnx": 1.08, "int8": 1.08}
TARGET = ("BERT-base", 1, 64, 8)
_LENGTHS = (64, 256)  # on which the exits are always fitted, so that files of one run serve the next

Call = Callable[[], list[list[int]]]


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


def measure(options: argparse.Namespace, results: Results) -> None:
    """The cells that the file lacks."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.sizes:
            lengths = sorted({*_LENGTHS, *(shape.length for shape in options.shapes)})
            forced = build(SIZES[name], lengths)
            sessions = Sessions(forced, Path(options.cache or temporary) / name, options.threads)
            for engine in options.engines:
                key = f"{engine}/{name}"
                section = results.get(key, {"environment": describe(options.threads), "rows": []})
                known = {(row["rows"], row["length"], row["tasks"]) for row in section["rows"]}
                for shape in options.shapes:
                    for tasks in options.tasks:
                        if (*shape[:2], tasks) in known:
                            continue
                        row = measure_cell(calls(forced, sessions, engine, tasks, *shape[:2]), tasks, shape, forced)
                        section["rows"].append(row)
                        results.keep(key, section)
                        print(f"{key} {shape} {tasks} tasks: {row['ratio'][ONE_PASS][1]:.3f}", flush=True)


def calls(forced: Forced, sessions: Sessions, engine: str, tasks: int, rows: int, length: int) -> dict[str, Call]:
    """The ways to answer many tasks; each returns the exits [T][B] of those that it answers. `STOCK` is one model."""
    names = add_stopping(forced, tasks)
    blocks = stops(tasks, forced.size.blocks)
    if engine == "torch":
        batch = forced.batch([2] * rows, length)
        stock = forced.stock
        together = lambda **inputs: forced.model.early_exit_forward(**inputs, tasks=names)  # noqa: E731

        def alone(i: int) -> list[int]:  # without switching
            return exits_of(forced.model.early_exit_forward(**batch, tasks=[names[i]])[names[i]])
    else:
        int8 = engine == "int8"
        batch = to_numpy(forced.batch([2] * rows, length))
        stock = sessions.plain(int8)
        together = sessions.tasks(names, int8)
        early = sessions.early(int8)
        own = [to_numpy(forced.batch([m] * rows, length)) for m in blocks]

        def alone(i: int) -> list[int]:
            return exits_of(early(**own[i]))

    def one_pass() -> list[list[int]]:
        out = together(**batch)
        return [exits_of(out[name]) for name in names]

    def stock_model() -> list[list[int]]:
        stock(**batch)
        return []

    each = lambda: [alone(i) for i in range(tasks)]  # noqa: E731
    return {DEEPEST: lambda: [alone(tasks - 1)], ONE_PASS: one_pass, EACH: each, STOCK: stock_model}


def stops(tasks: int, blocks: int) -> list[int]:
    """[T], the block at which each task stops: from 2 to M, the last the deepest."""
    return [int(number) for number in np.linspace(blocks if tasks == 1 else 2, blocks, tasks).round()]


@torch.no_grad()
def add_stopping(forced: Forced, tasks: int) -> list[str]:
    """Gives the model `tasks` adapters, each of which stops at its own block, and returns their names."""
    names = [f"task{i}_of_{tasks}" for i in range(tasks)]
    for name, stop in zip(names, stops(tasks, forced.size.blocks), strict=True):
        if name not in forced.model.peft_config:
            add_copy(forced, name)
            badge = forced.model.base_model
            for number in badge.exit_layers(name)[:-1]:  # the last is the model's own head
                linear = badge.block_at(number).own_exit(name, number).linear
                linear.weight.zero_()
                linear.bias.copy_(torch.tensor([SURE if number >= stop - 1 else 0.0, 0.0]))
    return names


def measure_cell(calls: dict[str, Call], tasks: int, shape: Shape, forced: Forced) -> dict[str, Any]:
    """Milliseconds of each way, its time over that of the deepest task alone, and over that of one pass; quartiles
    over the rounds.

    Raises:
        RuntimeError: a task does not stop where it should.
    """
    planned = [[m] * shape.rows for m in stops(tasks, forced.size.blocks)]
    for name in (DEEPEST, ONE_PASS, EACH):
        found = calls[name]()
        wanted = planned[-1:] if name == DEEPEST else planned
        if found != wanted:
            raise RuntimeError(f"{name}: the tasks stop at {found} and should at {wanted}")
    others = {name: call for name, call in calls.items() if name != DEEPEST}
    with torch.inference_mode():
        timed = against_base(calls[DEEPEST], others, shape.rounds, warmup=2 if shape.rounds > 5 else 1)
    seconds = {name: np.asarray(timing.seconds) for name, timing in timed.items()}
    seconds[STOCK] *= tasks  # one after another
    deepest = {name: np.asarray(timing.base_seconds) for name, timing in timed.items()}
    return {
        **shape._asdict(),
        "tasks": tasks,
        "ms": {name: quartiles(1e3 * x) for name, x in {DEEPEST: deepest[ONE_PASS], **seconds}.items()},
        "ratio": {name: quartiles(x / deepest[name]) for name, x in seconds.items()},
        "gain": {name: quartiles(x / seconds[ONE_PASS]) for name, x in seconds.items() if name != ONE_PASS},
    }


def page(results: Results) -> str:
    """Markdown."""
    cells = {(engine, size): own for engine in ENGINES for size, own in results.below(engine).items()}
    rows = [(engine, size, row) for (engine, size), own in cells.items() for row in own["rows"]]
    shapes = sorted({(row["rows"], row["length"], row["rounds"]) for _, _, row in rows})
    where = next(iter(cells.values()))["environment"]
    reached = [
        f"{row['ratio'][ONE_PASS][1]:.2f} in {ENGINES[engine]} (target {TARGETS[engine]:.2f}: "
        f"{verdict(row['ratio'][ONE_PASS][1] <= TARGETS[engine])})"
        for engine, size, row in rows
        if (size, row["rows"], row["length"], row["tasks"]) == TARGET
    ]
    size, count, length, tasks = TARGET
    what = f"{tasks} tasks in one pass, times the deepest of them alone ({size}, {count} row of {length} tokens)"
    counts = sorted({row["tasks"] for _, _, row in rows})
    heads = ["", "model", "rows x tokens"]
    ratios, gains = [], []
    for (engine, size), own in cells.items():
        for shape in sorted({(row["rows"], row["length"]) for row in own["rows"]}):
            found = {row["tasks"]: row for row in own["rows"] if (row["rows"], row["length"]) == shape}
            line = [ENGINES[engine], size, f"{shape[0]} x {shape[1]}"]
            alone = f"{found[max(found)]['ms'][DEEPEST][1]:.1f}"
            ratios.append([*line, alone, *(_ratio(found.get(n)) for n in counts)])
            gains.append([*line, *(_gains(found.get(n)) for n in counts)])
    columns = [f"{n} task{'s' if n > 1 else ''}" for n in counts]
    return f"""# Many tasks on the same rows

What one pass costs that answers N tasks, `early_exit_forward(**batch, tasks=[...])` or one ONNX file of all: beside
the deepest of them alone, a call (or file) for each, and a full stock model for each.

**{what}:** {"; ".join(reached) or "not measured"}.

Made by

```bash
python benchmarks/tasks.py --json FILE --shapes {" ".join(f"{n}x{length}@{rounds}" for n, length, rounds in shapes)}
python benchmarks/tasks.py --json FILE --docs docs/results/tasks.md
```

on {where["date"]}, load {where["load_1min"]} at the start: {machine(where)}.

Random weights, float32 unless int8 is named, rows without padding. The tasks of a row stop at blocks spread evenly
from 2 to M, by decisions at every exit (divergence) whichever way they are called, which is checked; so the deepest
task alone is a full pass that decides at every exit. The ways take turns in each round, and a number is the median
over the rounds of the quotient within a round, quartiles in brackets. One stock model is timed and counted N times,
and in ONNX Runtime one file stands for those of single tasks: N sets of weights would find less room in the caches, so
this is in their favor. Sessions do not spin. Two or three rounds (@2, @3) tell one pass from several, and no more.

## One pass, times the deepest task alone

{markdown([*heads, "deepest alone, ms", *columns], ratios)}

## What could be run instead, times one pass

A call (or file) for each task / a stock model for each.

{markdown([*heads, *columns], gains)}
{stack_section(results)}"""


def _ratio(row: Any) -> str:
    return "-" if row is None else "{1:.2f} [{0:.2f}, {2:.2f}]".format(*row["ratio"][ONE_PASS])


def _gains(row: Any) -> str:
    return "-" if row is None else f"{row['gain'][EACH][1]:.1f} / {row['gain'][STOCK][1]:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, RESULTS)
    shapes = [Shape(1, 64), Shape(1, 256), Shape(32, 64, 5), Shape(32, 256, 3)]
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["BERT-base", "h384"])
    options.add_argument("--tasks", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers of tasks")
    options.add_argument("--shapes", nargs="+", type=Shape.parse, default=shapes, metavar="ROWSxTOKENS[@ROUNDS]")
    options.add_argument("--cache", metavar="FOLDER", help="keep exported ONNX files here; what is there is used")
    return run(options.parse_args(arguments), measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
