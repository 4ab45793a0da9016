"""Many tasks on the same rows, in one pass: against a stock model for each, and a call for each.

    python benchmarks/tasks.py --docs docs/results/tasks.md     # about half an hour on 2 free cores
    python benchmarks/tasks.py --sizes h384 --tasks 4 --rows 1 --lengths 16 --rounds 20

The adapters have the same random weights under different names, and each its own block before which it does not stop
(`min_exit`), spread evenly from 2 to M: the tasks of a row stop at different blocks, by real decisions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from latency_parts.environment import describe
from latency_parts.forced import RULE, Forced, build
from latency_parts.settings import SIZES
from latency_parts.tables import markdown
from latency_parts.turns import Timing, against_base
from mixed import add_tasks

Call = Callable[[], list[list[int]]]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    environment = describe(options.threads, "cpu")
    rows = []
    for name in options.sizes:
        forced = build(SIZES[name], options.lengths)
        for length in options.lengths:
            for count in options.rows:
                for tasks in options.tasks:
                    rows.append([name, *measure(forced, tasks, count, length, options.rounds)])
                    print("  ".join(rows[-1]), flush=True)
    text = page(rows, environment, options)
    if options.docs:
        Path(options.docs).write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def stops(tasks: int, blocks: int) -> list[int]:
    """[T], the block at which each task stops: from 2 to M, the last the deepest."""
    return [int(number) for number in np.linspace(blocks if tasks == 1 else 2, blocks, tasks).round()]


def calls(forced: Forced, tasks: int, rows: int, length: int) -> dict[str, Call]:
    """The ways to answer all tasks for the same rows; each returns the exits [T][B]."""
    model, names = forced.model, add_tasks(forced, tasks)[:tasks]
    rules = dict(zip(names, ({**RULE, "min_exit": m} for m in stops(tasks, forced.size.blocks)), strict=True))
    batch = forced.batch([2] * rows, length)

    def one_pass() -> list[list[int]]:
        out = model.early_exit_forward(**batch, tasks=names, early_exit_config=rules)
        return [out[name].exit_layer.tolist() for name in names]

    def alone(name: str) -> list[int]:
        out = model.early_exit_forward(**batch, tasks=[name], early_exit_config=rules[name])  # without switching
        return out[name].exit_layer.tolist()

    def stock_models() -> list[list[int]]:
        for _ in names:
            forced.stock(**batch)
        return one_pass_exits

    one_pass_exits = one_pass()
    return {
        "one pass": one_pass,
        "deepest alone": lambda: [alone(names[-1])],
        "a call each": lambda: [alone(name) for name in names],
        "stock models": stock_models,
    }


def measure(forced: Forced, tasks: int, rows: int, length: int, rounds: int) -> list[str]:
    """One row of the table, without the model's name.

    Raises:
        RuntimeError: a task does not stop where it should.
    """
    ways = calls(forced, tasks, rows, length)
    planned = [[m] * rows for m in stops(tasks, forced.size.blocks)]
    for name in ("one pass", "a call each"):
        found = ways[name]()
        if found != planned:
            raise RuntimeError(f"{name}: the tasks stop at {found} and should at {planned}")
    base = ways.pop("deepest alone")
    with torch.inference_mode():
        timed = against_base(base, ways, rounds)
    return [
        str(rows),
        str(length),
        str(tasks),
        milliseconds(timed["one pass"].base_seconds),
        *(milliseconds(timed[name].seconds) for name in ("one pass", "a call each", "stock models")),
        ratio(timed["one pass"]),
        *(gain(timed[name], timed["one pass"]) for name in ("a call each", "stock models")),
    ]


def milliseconds(seconds: list[float]) -> str:
    """The median."""
    return f"{1e3 * np.quantile(seconds, 0.5):.1f}"


def ratio(timing: Timing) -> str:
    """Time over that of the deepest task alone: median over the rounds, and quartiles."""
    ratios = [own / base for own, base in zip(timing.seconds, timing.base_seconds, strict=True)]
    return f"{np.quantile(ratios, 0.5):.2f} [{np.quantile(ratios, 0.25):.2f}, {np.quantile(ratios, 0.75):.2f}]"


def gain(other: Timing, shared: Timing) -> str:
    """How many times as long another way takes, round by round: the median."""
    ratios = [theirs / ours for theirs, ours in zip(other.seconds, shared.seconds, strict=True)]
    return f"{np.quantile(ratios, 0.5):.1f}x"


def page(rows: list[list[str]], environment: dict[str, Any], options: argparse.Namespace) -> str:
    """Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lists = {name: " ".join(map(str, getattr(options, name))) for name in ("sizes", "tasks", "rows", "lengths")}
    shapes = " ".join(f"--{name} {values}" for name, values in lists.items())
    command = f"python benchmarks/tasks.py {shapes} \\\n    --rounds {options.rounds} --threads {options.threads}"
    heads = [
        *("model", "rows", "tokens", "tasks", "deepest task alone, ms", "one pass, ms", "a call each, ms"),
        *("stock models, ms", "one pass / deepest alone", "a call each / one pass", "stock models / one pass"),
    ]
    return f"""# Many tasks on the same rows

What `early_exit_forward(**batch, tasks=[...])` costs for N tasks: beside the deepest of them alone, a call for each,
and a full stock model for each, one after another. Made by

```bash
{command} --docs docs/results/tasks.md
```

on {environment["date"]}: {environment["cpu"]}, {environment["threads"]} threads of {environment["cores"]} cores, load
{environment["load_1min"]} at the start; Python {environment["python"]}, {versions}.

Random weights, float32, PyTorch. The tasks of a row stop at blocks spread evenly from 2 to M, by real decisions
(divergence), whichever way they are called, which is checked; so the deepest task alone is a full pass with exits.
Milliseconds are medians over {options.rounds} rounds, in which the ways take turns; the ratio to the deepest task
alone has its quartiles.

{markdown((heads, rows))}
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["BERT-base", "h384"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers of tasks")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32], help="rows of a batch")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256], help="tokens of each row")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--docs", metavar="FILE", help="write the page here")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
