"""What `compile_blocks` saves: exits with compiled blocks, against eager ones and the stock model compiled alike.

    python benchmarks/compiled.py                               # about 90 minutes on 2 free cores; needs g++
    python benchmarks/compiled.py --sizes h384 --rows 1         # about 15 minutes
    python benchmarks/compiled.py --docs docs/results/compiled.md   # measures nothing: the page from the file

A cell is a model, a batch size and a length; each is stored as it is measured. `--sizes tiny` tries the benchmark.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from common import Results, describe, machine, markdown, parser, run, spread
from latency_parts.forced import SIZES, Forced, build, exits_of, shared_copy
from latency_parts.turns import run_alone

import badge_peft
from badge_peft.evaluation.timing import take_turns

STOCK = "stock, eager"
BLOCKS = "stock, each block compiled"
WHOLE = "stock, compiled as a whole"
OUTSIDE = "stock without its blocks, eager"
EAGER = "leaves at block {}, eager"
COMPILED = "leaves at block {}, compile_blocks"
_HOW = """Made by

```bash
python benchmarks/compiled.py --json FILE
python benchmarks/compiled.py --json FILE --docs docs/results/compiled.md
```

Random weights, float32, rows without padding that leave by real decisions (DGE), all rows of a batch at the same
block; `torch.compile` with inductor, everything compiled for the shape that is measured. All calls of a column take
turns, round by round; a ratio is the median over the rounds of the quotient within a round, with the quartiles in
brackets. The *limit* is what the stock model, compiled block by block, needs outside of its blocks (the stock model
with none, eager) and in k of M of them."""


def measure(options: argparse.Namespace, results: Results) -> None:
    """The cells that the file lacks."""
    for name in options.sizes:
        forced = build(SIZES[name], options.lengths)
        exits = [k for k in options.exits if k <= forced.size.blocks]
        for rows in options.rows:
            for length in options.lengths:
                key = f"{name}/B={rows}/S={length}"
                if key not in results:
                    where = describe(options.threads)
                    start = time.perf_counter()
                    cell = measure_cell(forced, rows, length, exits, options.rounds, options.backend)
                    took = round(time.perf_counter() - start, 1)
                    results.keep(key, {"environment": where, "took_s": took, "seed": 0, **cell})
                    print(f"{key}: {took:.0f} s", flush=True)


def measure_cell(
    forced: Forced, rows: int, length: int, exits: Sequence[int], rounds: int, backend: str = "inductor"
) -> dict[str, Any]:
    """Compiles everything anew for one shape, and times it in turns. The stock model is compiled in two ways: block by
    block, as `compile_blocks` does it, and as a whole, which early exits cannot be.

    Returns:
        `seconds` name -> [rounds], `first_call_s` name -> seconds of the call that compiles, `as_forced` whether all
        rows left where they should, compiled or not, and `max_difference` of the logits from those of the eager ones.
    """
    torch._dynamo.reset()
    blocks, whole, model = (shared_copy(x) for x in (forced.stock, forced.stock, forced.model))
    for layer in blocks.bert.encoder.layer:
        layer.compile(dynamic=False, backend=backend)
    whole.compile(dynamic=False, backend=backend)
    badge_peft.compile_blocks(model, buckets=[length], backend=backend)

    full = forced.batch([forced.size.blocks] * rows, length)
    stock = {STOCK: forced.stock, BLOCKS: blocks, WHOLE: whole, OUTSIDE: forced.outside}
    calls: dict[str, Callable[[], Any]] = {name: partial(x, **full) for name, x in stock.items()}
    for k in exits:
        batch = forced.batch([k] * rows, length, seed=k)
        calls[EAGER.format(k)] = partial(forced.model.early_exit_forward, **batch)
        calls[COMPILED.format(k)] = partial(model.early_exit_forward, **batch)

    with torch.inference_mode():
        outputs, first = {}, {}
        for name, call in calls.items():
            start = time.perf_counter()
            outputs[name] = call()
            first[name] = round(time.perf_counter() - start, 3)
        pairs = [(BLOCKS, STOCK), (WHOLE, STOCK), *((COMPILED.format(k), EAGER.format(k)) for k in exits)]
        difference = max(float((outputs[a].logits - outputs[b].logits).abs().max()) for a, b in pairs)
        left = [exits_of(outputs[kind.format(k)]) == [k] * rows for k in exits for kind in (EAGER, COMPILED)]
        timed = take_turns([run_alone(call) for call in calls.values()], [None], rounds, warmup=[None] * 2)
    return {
        "seconds": {name: [round(s, 7) for s in x.seconds] for name, x in zip(calls, timed, strict=True)},
        "first_call_s": first,
        "as_forced": all(left),
        "max_difference": difference,
        "rounds": rounds,
        "blocks": forced.size.blocks,
        "exits": list(exits),
    }


def page(cells: Mapping[str, Any]) -> str:
    """Markdown."""
    medians = [
        float(np.median(_seconds(cell, COMPILED.format(k)) / _seconds(cell, EAGER.format(k))))
        for cell in cells.values()
        for k in cell["exits"]
    ]
    said = (
        f"Exits with compiled blocks are faster than eager ones in {sum(x < 1 for x in medians)} of {len(medians)} "
        f"cases: they take {min(medians):.2f} to {max(medians):.2f} of the time."
    )
    parts = ["# Compiled blocks", "What `compile_blocks` saves, on the clock.", _HOW, said]
    for size in dict.fromkeys(key.split("/")[0] for key in cells):
        mine = [key for key in cells if key.split("/")[0] == size]
        parts += [f"## {size}", *_tables({key.split("/", 1)[1].replace("/", ", "): cells[key] for key in mine})]
    lines: dict[str, list[str]] = {}
    for key, cell in cells.items():
        where = cell["environment"]
        run = f"{where['date']}, load {where['load_1min']}, {cell['rounds']} rounds, {cell['took_s']:.0f} s"
        left = "all rows left as forced" if cell["as_forced"] else "! rows left elsewhere"
        lines.setdefault(f"{machine(where)}; weights of seed {cell['seed']}", []).append(
            f"{key} ({run}, {left}, logits within {cell['max_difference']:.0e} of eager)"
        )
    places = "\n".join(f"* {line}: {'; '.join(keys)}" for line, keys in lines.items())
    return "\n\n".join([*parts, "## Where it was measured", places]) + "\n"


def _tables(cells: Mapping[str, Any]) -> list[str]:
    """Times, ratios and compile times of one model, a column per shape."""
    exits = list(dict.fromkeys(k for cell in cells.values() for k in cell["exits"]))
    names = [STOCK, BLOCKS, WHOLE, OUTSIDE, *(kind.format(k) for k in exits for kind in (EAGER, COMPILED))]
    times = [[name, *(_cell(1e3 * _seconds(cell, name), 2) for cell in cells.values())] for name in names]

    def ratios(name: str, value: Callable[[Any], np.ndarray]) -> list[str]:
        return [name, *(_cell(value(cell)) for cell in cells.values())]

    lines = [ratios("stock, blocks compiled / eager", lambda cell: _seconds(cell, BLOCKS) / _seconds(cell, STOCK))]
    for k in exits:
        mine = COMPILED.format(k)
        other = EAGER.format(k)
        what = f"leaves at block {k}: compiled"
        lines.append(ratios(f"{what} / eager", lambda cell, a=mine, b=other: _seconds(cell, a) / _seconds(cell, b)))
        lines.append(ratios(f"{what} / limit", lambda cell, a=mine, k=k: _seconds(cell, a) / _limit(cell, k)))
    compiling = [
        [name, *(f"{cell['first_call_s'][name]:.1f}" for cell in cells.values())]
        for name in (BLOCKS, WHOLE, COMPILED.format(exits[0]))
    ]
    return [
        markdown(["ms: median (quartiles)", *cells], times),
        markdown(["ratio", *cells], lines),
        markdown(["seconds of the first call, which compiles", *cells], compiling),
    ]


def _seconds(cell: Mapping[str, Any], name: str) -> np.ndarray:
    return np.asarray(cell["seconds"].get(name, [np.nan]))  # an exit that was not measured at this shape


def _limit(cell: Mapping[str, Any], k: int) -> np.ndarray:
    outside = _seconds(cell, OUTSIDE)
    stock = _seconds(cell, BLOCKS)
    return outside + k / cell["blocks"] * (stock - outside)


def _cell(values: np.ndarray, digits: int = 3) -> str:
    return "-" if np.isnan(values).any() else spread(values, digits)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, "runs/compiled.json")
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["BERT-base", "h384"])
    options.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="of a batch")
    options.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128], help="tokens per row")
    options.add_argument(
        "--exits",
        type=int,
        nargs="+",
        default=[2, 6, 12],
        help="blocks at which rows leave",
    )
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument(
        "--backend",
        default="inductor",
        help="of torch.compile; another one is to try the benchmark",
    )
    return run(options.parse_args(arguments), measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
