"""The page of many tasks, from the file of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latency_parts.tables import Table, markdown

from task_parts.stack_page import stack_section
from task_parts.ways import EACH, ENGINES, ONE_PASS, STOCK

Row = Mapping[str, Any]
#: Engine, what the deepest task alone may be exceeded by: eight tasks, BERT-base, 64 tokens, one row.
TARGETS = {"torch": 1.15, "onnx": 1.08, "int8": 1.08}
_TARGET = ("BERT-base", 1, 64, 8)
_SHAPES = ((1, 64), (1, 256), (32, 64), (32, 256))  # rows and tokens that were asked for


def write_page(data: Mapping[str, Any], path: str | Path) -> str:
    """Writes the page, and returns what it says of the targets."""
    text = page(data)
    Path(path).write_text(text, encoding="utf-8")
    return targets(data)


def page(data: Mapping[str, Any]) -> str:
    """Markdown."""
    cells = _cells(data)
    environment = data["sections"]["/".join(next(iter(cells)))]["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"""# Many tasks on the same rows

What one pass costs that answers N tasks, `early_exit_forward(**batch, tasks=[...])` or one ONNX file of all: beside
the deepest of them alone, a call (or file) for each, and a full stock model for each.

{targets(data)}

Made by

```bash
python benchmarks/tasks.py --json FILE --shapes {_shapes(cells)}
python benchmarks/tasks.py --json FILE --docs docs/results/tasks.md
```

on {environment["date"]}: {environment["cpu"]}, {environment["threads"]} threads of {environment["cores"]} cores, load
{environment["load_1min"]} at the start; Python {environment["python"]}, {versions}.

Random weights, float32 unless int8 is named, rows without padding. The tasks of a row stop at blocks spread evenly
from 2 to M, by decisions at every exit (divergence) whichever way they are called, which is checked; so the deepest
task alone is a full pass that decides at every exit. The ways take turns in each round, and a number is the median
over the rounds of the quotient within a round, quartiles in brackets. One stock model is timed and counted N times,
and in ONNX Runtime one file stands for those of single tasks: N sets of weights would find less room in the caches, so
this is in their favor. Sessions do not spin. Two or three rounds (@2, @3) tell one pass from several,
and no more.{_left_out(cells)}

## One pass, times the deepest task alone

{markdown(_ratios(cells))}

## What could be run instead, times one pass

A call (or file) for each task / a stock model for each.

{markdown(_gains(cells))}
{stack_section(data)}"""


def targets(data: Mapping[str, Any]) -> str:
    """The targets, and what was measured."""
    size, rows, length, tasks = _TARGET
    found = []
    for (engine, name), own in _cells(data).items():
        for row in own:
            if (name, row["rows"], row["length"], row["tasks"]) == _TARGET:
                value, bound = row["ratio"][ONE_PASS][1], TARGETS[engine]
                verdict = "reached" if value <= bound else "missed"
                found.append(f"{value:.2f} in {ENGINES[engine]} (target {bound:.2f}: {verdict})")
    if not found:
        return "The cell of the targets has not been measured."
    what = f"{tasks} tasks in one pass, times the deepest of them alone ({size}, {rows} row of {length} tokens)"
    return f"**{what}:** {'; '.join(found)}."


def _cells(data: Mapping[str, Any]) -> dict[tuple[str, str], list[Row]]:
    """By engine and size, in the order of `ENGINES`."""
    names = [tuple(key.split("/")) for key in data["sections"] if key.split("/")[0] in ENGINES]
    ordered = sorted(names, key=lambda name: list(ENGINES).index(name[0]))
    return {(engine, size): data["sections"][f"{engine}/{size}"]["rows"] for engine, size in ordered}


def _ratios(cells: Mapping[tuple[str, str], Sequence[Row]]) -> Table:
    def cell(row: Row) -> str:
        low, middle, high = row["ratio"][ONE_PASS]
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"

    return _pivot(cells, cell, deepest=True)


def _gains(cells: Mapping[tuple[str, str], Sequence[Row]]) -> Table:
    return _pivot(cells, lambda row: f"{row['gain'][EACH][1]:.1f} / {row['gain'][STOCK][1]:.1f}")


def _pivot(cells: Mapping[tuple[str, str], Sequence[Row]], cell: Any, deepest: bool = False) -> Table:
    """One line per engine, size and shape; one column per number of tasks."""
    counts = sorted({row["tasks"] for rows in cells.values() for row in rows})
    heads = ["", "model", "rows x tokens", *(["deepest alone, ms"] if deepest else [])]
    lines = []
    for (engine, size), rows in cells.items():
        for shape in sorted({(row["rows"], row["length"]) for row in rows}):
            own = {row["tasks"]: row for row in rows if (row["rows"], row["length"]) == shape}
            line = [ENGINES[engine], size, f"{shape[0]} x {shape[1]}"]
            if deepest:
                line.append(f"{own[max(own)]['ms']['deepest alone'][1]:.1f}")
            lines.append([*line, *(cell(own[n]) if n in own else "-" for n in counts)])
    return [*heads, *(f"{n} task{'s' if n > 1 else ''}" for n in counts)], lines


def _shapes(cells: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    found = dict.fromkeys((row["rows"], row["length"], row["rounds"]) for rows in cells.values() for row in rows)
    return " ".join(f"{rows}x{length}@{rounds}" for rows, length, rounds in sorted(found))


def _left_out(cells: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    """What was asked for and not measured."""
    every = [(row["rows"], row["length"], row["tasks"]) for rows in cells.values() for row in rows]
    shapes, counts = sorted({x[:2] for x in every}), sorted({x[2] for x in every})
    missing = sum(
        (shape, n) not in {((row["rows"], row["length"]), row["tasks"]) for row in rows}
        for rows in cells.values()
        for shape in shapes
        for n in counts
    )
    none = [f"{rows} x {length}" for rows, length in _SHAPES if (rows, length) not in shapes]
    left = ["what has a `-`"] * bool(missing) + [f"rows x tokens of {', '.join(none)}"] * bool(none)
    return f" Left out, for the time that it takes: {'; '.join(left)}." if left else ""
