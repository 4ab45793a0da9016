"""Rows of several tasks in one pass, against one call per task: what sharing the blocks saves.

    python benchmarks/mixed.py --docs docs/results/mixed.md     # about 5 minutes on 2 free cores
    python benchmarks/mixed.py --sizes h384 --tasks 4 --rows 2 --rounds 20

The adapters have the same random weights under different names, so that each row leaves where its first token says,
by a real decision, whichever way it is called.
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
from latency_parts.forced import Forced, add_copy, build, exits_of, spread
from latency_parts.settings import SIZES
from latency_parts.tables import markdown
from latency_parts.turns import Timing, against_base

Call = Callable[[], list[int]]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    environment = describe(options.threads, "cpu")
    rows = []
    for name in options.sizes:
        forced = build(SIZES[name], [options.length])
        for tasks in options.tasks:
            add_tasks(forced, tasks)
            for per_task in options.rows:
                rows.append([name, *measure(forced, tasks, per_task, options.length, options.rounds)])
                print("  ".join(rows[-1]), flush=True)
    text = page(rows, environment, options)
    if options.docs:
        Path(options.docs).write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def add_tasks(forced: Forced, tasks: int) -> list[str]:
    """Gives the model `tasks` adapters of the same weights, and returns their names."""
    names = ["default", *(f"task{i}" for i in range(2, tasks + 1))]
    for name in names:
        if name not in forced.model.peft_config:
            add_copy(forced, name)
    return names


def calls(forced: Forced, tasks: int, per_task: int, length: int) -> dict[str, Call]:
    """The three ways to answer the same rows; each returns the exits, task by task."""
    model = forced.model
    names = add_tasks(forced, tasks)
    count = tasks * per_task
    batch = forced.batch(spread(count, forced.size.blocks), length)
    parts = [{key: value[i::tasks] for key, value in batch.items()} for i in range(tasks)]

    def one_pass() -> list[int]:
        exits = exits_of(model.early_exit_forward(**batch, adapter_names=names * per_task))
        return [exit_ for i in range(tasks) for exit_ in exits[i::tasks]]

    def a_call_each() -> list[int]:
        found = []
        for name, part in zip(names, parts, strict=True):
            model.set_adapter(name)
            found += exits_of(model.early_exit_forward(**part))
        return found

    def without_switching() -> list[int]:
        found = []
        for name, part in zip(names, parts, strict=True):
            found += exits_of(model.early_exit_forward(**part, adapter_names=[name] * per_task))
        return found

    return {"a call each": a_call_each, "without switching": without_switching, "one pass": one_pass}


def measure(forced: Forced, tasks: int, per_task: int, length: int, rounds: int) -> list[str]:
    """One row of the table, without the model's name.

    Raises:
        RuntimeError: the ways do not agree on where the rows leave.
    """
    ways = calls(forced, tasks, per_task, length)
    exits = [call() for call in ways.values()]
    if any(found != exits[0] for found in exits):
        raise RuntimeError(f"the ways do not agree on the exits: {exits}")
    base = ways.pop("a call each")
    with torch.inference_mode():
        found = against_base(base, ways, rounds)
    shared = found["one pass"]
    return [
        str(tasks),
        str(per_task),
        f"{sum(exits[0]) / len(exits[0]):.2f}",
        f"{1e3 * np.quantile(shared.base_seconds, 0.5):.1f}",
        f"{1e3 * np.quantile(found['without switching'].seconds, 0.5):.1f}",
        f"{1e3 * np.quantile(shared.seconds, 0.5):.1f}",
        gain(shared),
        gain(found["without switching"]),
    ]


def gain(timing: Timing) -> str:
    """How many times faster than a call each: median over the rounds, and quartiles."""
    ratios = [base / own for own, base in zip(timing.seconds, timing.base_seconds, strict=True)]
    return f"{np.quantile(ratios, 0.5):.2f} [{np.quantile(ratios, 0.25):.2f}, {np.quantile(ratios, 0.75):.2f}]"


def page(rows: list[list[str]], environment: dict[str, Any], options: argparse.Namespace) -> str:
    """Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    command = f"python benchmarks/mixed.py --rounds {options.rounds} --threads {options.threads}"
    heads = [
        "model",
        "tasks",
        "rows each",
        "mean exit",
        "a call each, ms",
        "without switching, ms",
        "one pass, ms",
        "one pass: times faster",
        "without switching: times faster",
    ]
    return f"""# Many tasks in one pass

What `early_exit_forward(**batch, adapter_names=[...])` saves against one call per adapter. Made by

```bash
{command} --docs docs/results/mixed.md
```

on {environment["date"]}: {environment["cpu"]}, {environment["threads"]} threads of {environment["cores"]} cores, load
{environment["load_1min"]} at the start; Python {environment["python"]}, {versions}.

Random weights, float32, {options.length} tokens per row. Every row leaves by a real decision, at blocks spread evenly
from 2 to M, and at the same block whichever way it is called, which is checked.

- *A call each*: `set_adapter`, then `early_exit_forward` with the rows of that task, task by task.
- *Without switching*: the same calls with `adapter_names` in the place of `set_adapter`.
- *One pass*: all rows in one call.

Milliseconds are medians over {options.rounds} rounds, in which the ways take turns. *Times faster* is the median of
the quotients within a round, against a call each, with its quartiles.

{markdown((heads, rows))}
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["BERT-base", "h384"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 8], help="numbers of adapters")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4], help="rows of each")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--docs", metavar="FILE", help="write the page there, and not to the screen")
    return parser


if __name__ == "__main__":
    sys.exit(main())
