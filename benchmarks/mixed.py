"""Rows of several tasks in one pass, against one call per task: what sharing the blocks saves.

    python benchmarks/mixed.py                                    # about 5 minutes on 2 free cores
    python benchmarks/mixed.py --docs docs/results/mixed.md       # measures nothing: the page from the file

The adapters have the same random weights under different names, so that each row leaves where its first token says,
by a real decision, whichever way it is called.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Results, describe, machine, markdown, parser, quartiles, run
from latency_parts.forced import SIZES, Forced, add_copy, build, even_exits, exits_of
from latency_parts.turns import against_base

EACH = "a call each"
WITHOUT = "without switching"
ONE = "one pass"


def measure(options: argparse.Namespace, results: Results) -> None:
    """The cells that the file lacks."""
    for name in options.sizes:
        forced = build(SIZES[name], [options.length])
        for tasks in options.tasks:
            for rows in options.rows:
                if (key := f"{name}/{tasks}/{rows}") not in results:
                    where = {"environment": describe(options.threads), "length": options.length}
                    results.keep(
                        key,
                        {
                            **where,
                            **measure_cell(
                                forced,
                                tasks,
                                rows,
                                options.length,
                                options.rounds,
                            ),
                        },
                    )
                    print(key, results[key]["ms"], flush=True)


def calls(forced: Forced, tasks: int, per_task: int, length: int) -> dict[str, Callable[[], list[int]]]:
    """The three ways to answer the same rows; each returns the exits, task by task."""
    model = forced.model
    names = ["default", *(f"task{i}" for i in range(2, tasks + 1))]
    for name in names:
        if name not in model.peft_config:
            add_copy(forced, name)
    batch = forced.batch(even_exits(tasks * per_task, forced.size.blocks), length)
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
        answers = (
            model.early_exit_forward(**part, adapter_names=[name] * per_task)
            for name, part in zip(names, parts, strict=True)
        )
        return [exit_ for answer in answers for exit_ in exits_of(answer)]

    return {EACH: a_call_each, WITHOUT: without_switching, ONE: one_pass}


def measure_cell(forced: Forced, tasks: int, per_task: int, length: int, rounds: int) -> dict[str, Any]:
    """The mean exit, milliseconds of each way, and how many times faster than a call each: quartiles over the rounds.

    Raises:
        RuntimeError: the ways do not agree on where the rows leave.
    """
    ways = calls(forced, tasks, per_task, length)
    exits = [call() for call in ways.values()]
    if any(found != exits[0] for found in exits):
        raise RuntimeError(f"the ways do not agree on the exits: {exits}")
    with torch.inference_mode():
        found = against_base(ways.pop(EACH), ways, rounds)
    ms = {name: 1e3 * float(np.median(timing.seconds)) for name, timing in found.items()}
    return {
        "mean_exit": float(np.mean(exits[0])),
        "rounds": rounds,
        "ms": {EACH: 1e3 * float(np.median(found[ONE].base_seconds)), **ms},
        "gain": {name: quartiles(np.divide(own.base_seconds, own.seconds)) for name, own in found.items()},
    }


def page(results: Results) -> str:
    """Markdown."""
    rows = []
    for key, cell in results.items():
        gains = [
            f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in (cell["gain"][n] for n in (ONE, WITHOUT))
        ]
        rows.append(
            [
                *key.split("/"),
                f"{cell['mean_exit']:.2f}",
                *(f"{cell['ms'][n]:.1f}" for n in (EACH, WITHOUT, ONE)),
                *gains,
            ]
        )
    heads = ["model", "tasks", "rows each", "mean exit", *(f"{name}, ms" for name in (EACH, WITHOUT, ONE))]
    heads += [f"{name}: times faster" for name in (ONE, WITHOUT)]
    first = next(iter(results.values()))
    where = first["environment"]
    return f"""# Many tasks in one pass

What `early_exit_forward(**batch, adapter_names=[...])` saves against one call per adapter. Made by

```bash
python benchmarks/mixed.py --rounds {first["rounds"]} --threads {where["threads"]}
python benchmarks/mixed.py --docs docs/results/mixed.md
```

on {where["date"]}, load {where["load_1min"]} at the start: {machine(where)}.

Random weights, float32, {first["length"]} tokens per row. Every row leaves by a real decision, at blocks spread evenly
from 2 to M, and at the same block whichever way it is called, which is checked.

- *A call each*: `set_adapter`, then `early_exit_forward` with the rows of that task, task by task.
- *Without switching*: the same calls with `adapter_names` in the place of `set_adapter`.
- *One pass*: all rows in one call.

Milliseconds are medians over {first["rounds"]} rounds, in which the ways take turns. *Times faster* is the median of
the quotients within a round, against a call each, with its quartiles.

{markdown(heads, rows)}
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, "runs/mixed.json")
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["BERT-base", "h384"])
    options.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 8], help="numbers of adapters")
    options.add_argument("--rows", nargs="+", type=int, default=[1, 4], help="rows of each")
    options.add_argument("--length", type=int, default=32, help="tokens of a row")
    options.add_argument("--rounds", type=int, default=30)
    return run(options.parse_args(arguments), measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
