"""The results of `compiled.py` as markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latency_parts.compiled_runs import BLOCKS, COMPILED, EAGER, OUTSIDE, STOCK, WHOLE
from latency_parts.tables import markdown

Cell = Mapping[str, Any]

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


def page(data: Mapping[str, Any]) -> str:
    """The page; `data` is what `Store` keeps.

    Raises:
        ValueError: nothing has been measured.
    """
    cells: dict[str, Cell] = data["sections"]
    if not cells:
        raise ValueError("there is nothing to write a page from: measure first.")
    parts = ["# Compiled blocks", "What `compile_blocks` saves, on the clock."]
    if data["quick"]:
        parts.append("**A trial run on a tiny model: the numbers say nothing about speed.**")
    parts += [_HOW, _verdict(cells)]
    for size in dict.fromkeys(key.split("/")[0] for key in cells):
        mine = {
            key.split("/", 1)[1].replace("/", ", "): cell for key, cell in cells.items() if key.startswith(f"{size}/")
        }
        parts += [f"## {size}", *_tables(mine)]
    return "\n\n".join([*parts, "## Where it was measured", _where(cells)]) + "\n"


def _tables(cells: Mapping[str, Cell]) -> list[str]:
    """Times, ratios and compile times of one model, a column per shape."""
    exits = list(dict.fromkeys(k for cell in cells.values() for k in cell["exits"]))
    names = [STOCK, BLOCKS, WHOLE, OUTSIDE, *(kind.format(k) for k in exits for kind in (EAGER, COMPILED))]
    times = [[name, *(_spread(1e3 * _seconds(cell, name), 2) for cell in cells.values())] for name in names]
    ratios = [["stock, blocks compiled / eager", *(_spread(_ratio(cell, BLOCKS, STOCK)) for cell in cells.values())]]
    for k in exits:
        against = [_spread(_ratio(cell, COMPILED.format(k), EAGER.format(k))) for cell in cells.values()]
        ratios.append([f"leaves at block {k}: compiled / eager", *against])
        limits = [_spread(_seconds(cell, COMPILED.format(k)) / _limit(cell, k)) for cell in cells.values()]
        ratios.append([f"leaves at block {k}: compiled / limit", *limits])
    compiling = [
        [name, *(f"{cell['first_call_s'][name]:.1f}" for cell in cells.values())]
        for name in (BLOCKS, WHOLE, COMPILED.format(exits[0]))
    ]
    return [
        markdown((["ms: median (quartiles)", *cells], times)),
        markdown((["ratio", *cells], ratios)),
        markdown((["seconds of the first call, which compiles", *cells], compiling)),
    ]


def _verdict(cells: Mapping[str, Cell]) -> str:
    medians = [
        float(np.median(_ratio(cell, COMPILED.format(k), EAGER.format(k))))
        for cell in cells.values()
        for k in cell["exits"]
    ]
    faster = sum(ratio < 1 for ratio in medians)
    return (
        f"Exits with compiled blocks are faster than eager ones in {faster} of {len(medians)} cases: they take "
        f"{min(medians):.2f} to {max(medians):.2f} of the time."
    )


def _seconds(cell: Cell, name: str) -> np.ndarray:
    return np.asarray(cell["seconds"].get(name, [np.nan]))  # an exit that was not measured at this shape


def _ratio(cell: Cell, name: str, base: str) -> np.ndarray:
    return _seconds(cell, name) / _seconds(cell, base)


def _limit(cell: Cell, k: int) -> np.ndarray:
    outside, stock = _seconds(cell, OUTSIDE), _seconds(cell, BLOCKS)
    return outside + k / cell["blocks"] * (stock - outside)


def _spread(values: np.ndarray, digits: int = 3) -> str:
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    return "-" if np.isnan(median) else f"{median:.{digits}f} ({q1:.{digits}f}-{q3:.{digits}f})"


def _where(cells: Mapping[str, Cell]) -> str:
    """Machine and versions, one line per combination, with what each cell says of itself."""
    lines: dict[str, list[str]] = {}
    for key, cell in cells.items():
        where = cell["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        machine = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads; Python {where['python']}"
        line = f"{machine}, {versions}; weights of seed {cell['seed']}"
        run = f"{where['date']}, load {where['load_1min']}, {cell['rounds']} rounds, {cell['took_s']:.0f} s"
        left = "all rows left as forced" if cell["as_forced"] else "! rows left elsewhere"
        lines.setdefault(line, []).append(
            f"{key} ({run}, {left}, logits within {cell['max_difference']:.0e} of eager)"
        )
    return "\n".join(f"* {line}: {'; '.join(keys)}" for line, keys in lines.items())
