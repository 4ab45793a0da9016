"""docs/results/speed.md, from the file of the results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from common import Results, machine, markdown

from latency_parts.runs import DGE, FIXED
from latency_parts.targets import OPEN, TARGETS, Verdict, judge

Row = Mapping[str, Any]
#: What each experiment measures.
TITLES = {
    "full-depth": "PyTorch: full depth with every exit computed, and early exit with nobody leaving, against stock",
    "exits": "PyTorch: leaving at block k, one row at a time, against k/M of stock",
    "batch": "PyTorch: batches whose rows leave at different blocks, against mean exit/M of stock",
    "onnx": "ONNX Runtime: leaving at block k, one row at a time, against k/M of plain export",
    "onnx-int8": "ONNX Runtime, int8: leaving at block k, one row at a time, against k/M of plain int8 export",
    "onnx-batch": "ONNX Runtime: batches whose rows leave at different blocks, against mean exit/M of plain export",
    "int8-vs-stock": "ONNX Runtime, int8, leaving half-way, against stock PyTorch: time over time",
    "expected": "PyTorch: what a call takes over what the cost model of `calibrate` expects of it",
    "memory": "Peak memory of a fresh process, PyTorch, against stock",
}

_HOW = """Random weights, float32 unless int8 is named, rows without padding. Rows leave by real decisions (DGE,
cross-entropy, threshold 0.2, patience 1) at blocks that the first token of each row sets, so that where a row leaves
is known beforehand; that it left there is checked, and a row that did not is marked with `!` and measured against the
block at which it left. DGE cannot stop at block 1: that row is for `fixed_depth` alone.

A *ratio* is time / (share of the blocks that ran x time of the model without exits at full depth): 1.00 means that
half of the blocks take half of the time. What is compared takes its turn in the same process, round by round; a ratio
is the median over the rounds of the quotient within a round, with the quartiles in brackets.

That share forgets what the model without exits pays outside of its blocks: embeddings, masks, pooler, head, and the
call itself, which a row that leaves early pays in full. The *limit* is what a call could do with that computes k of M
blocks, an exit for nothing and all the rest: outside of the blocks + k/M of (full depth - outside of the blocks). What
is outside is the time of the same model with its list of blocks emptied, which takes its turn beside the full one in
every round; a *ratio to the limit* is time / limit within a round. ONNX Runtime sessions do
not spin (`session.intra_op.allow_spinning` = 0) and have `inter_op_num_threads` = 1: idle threads that spin take cores
from whatever runs next, and spoil both. Int8 against stock PyTorch is measured call after call, as in a service: each
call is made twice and the second counts."""

_CAUSES = """The times above, batch 1, as straight lines over the block k at which a row leaves (least squares):
*outside of the blocks* is where the line of `fixed_depth` starts (embeddings, masks, the call), *a block* its slope,
*an exit and its decision* how much steeper the line of DGE is. *Stock* is what remains of the stock model's time when
the first is taken from it, per block.

A row that leaves at block k pays for all that is outside of the blocks, but the ratio allows it k/M of that: at block
2 of 12 this alone is 5/6 of the first number over the time of two blocks. The rest of a ratio above 1 is the exit and
its decision over a block. Both weigh more the smaller a block is: few tokens, narrow models, int8."""


def page(results: Results) -> str:
    """Markdown."""
    verdicts = [judge(target, results) for target in TARGETS]
    counts = ", ".join(f"{count} {status}" for status, count in Counter(v.status for v in verdicts).items())
    parts = [
        "# Speed",
        "What exits cost when nobody leaves, and what leaving saves, on the clock.",
        "Made by",
        "```bash\npython benchmarks/latency.py --json FILE\n"
        "python benchmarks/latency.py --json FILE --docs docs/results/speed.md\n```",
        _HOW,
        "## Targets",
        f"Bounds on medians, set before the measurement; one on several rows is reached when all are. {counts}.",
        markdown(["target", "model", "bound", "worst row measured", "result"], map(_verdict_line, verdicts)),
    ]
    for experiment, title in TITLES.items():
        parts.append(f"## {title}")
        for key, section in results.below(experiment).items():
            size, device = key.split("/")
            where = section["environment"]
            rows = section["rows"]
            rounds = "/".join(map(str, sorted({row["rounds"] for row in rows})))
            parts.append(f"### {size}, {where['device'] if device == 'cuda' else 'CPU'}")
            parts.append(f"{rounds} rounds, {where['threads']} threads, {where['date']}.")
            parts += tables(experiment, rows)
    causes = [line for key, section in results.items() for line in _causes(key, section["rows"])]
    header = ["", "tokens", "outside of the blocks, ms", "a block, ms", "an exit and its decision, ms", "stock, ms"]
    parts += ["## Where the time goes", _CAUSES, markdown(header, causes)]
    lines: dict[str, list[str]] = {}
    for key, section in results.items():
        where = section["environment"]
        said = f"{key} (load {where['load_1min']}, {section['seconds']:.0f} s)"
        lines.setdefault(f"{machine(where)}; {where['device']}", []).append(said)
    places = "\n".join(f"* {line}: {', '.join(keys)}" for line, keys in lines.items())
    return "\n\n".join([*parts, "## Where it was measured", places]) + "\n"


def tables(experiment: str, rows: Sequence[Row]) -> list[str]:
    """Ratios, ratios to the limit, and times (or megabytes): one line per variant and exit, one column per shape."""
    limited = [row for row in rows if "limit_ratio" in row and experiment != "full-depth"]
    found = [_pivot("ratio", rows, _ratio)]
    found += [_pivot("ratio to the limit", limited, lambda row: _ratio(row, "limit_ratio"))] if limited else []
    base = rows[0]["base"]
    if experiment == "memory":
        first = {"the imported libraries alone": _of("{imports_mb:.0f} MB"), base: _of("{base_peak_mb:.0f} MB")}
        return [*found, _pivot("peak", rows, _of("{peak_mb:.0f} MB"), first)]
    first = {base: _of("{base_p50_ms:.2f} / {base_p95_ms:.2f}")}
    if "outside_p50_ms" in rows[0]:
        first["the same without its blocks"] = _of("{outside_p50_ms:.2f}")
    return [*found, _pivot("ms: median / p95", rows, _of("{p50_ms:.2f} / {p95_ms:.2f}"), first)]


def _pivot(
    name: str, rows: Sequence[Row], cell: Callable[[Row], str], first: Mapping[str, Callable[[Row], str]] | None = None
) -> str:
    """The lines of `first` say what all rows of a shape have in common."""
    columns = list(dict.fromkeys(map(_shape, rows)))
    cells = {(_name(row), _shape(row)): cell(row) for row in rows}
    of_shape = {_shape(row): row for row in rows}
    lines = [[title, *(common(of_shape[column]) for column in columns)] for title, common in (first or {}).items()]
    lines += [[n, *(cells.get((n, column), "-") for column in columns)] for n in dict.fromkeys(map(_name, rows))]
    return markdown([name, *columns], lines)


def _of(text: str) -> Callable[[Row], str]:
    return lambda row: text.format(**row)


def _ratio(row: Row, name: str = "ratio") -> str:
    text = f"{row[name]:.3f} ({row[f'{name}_q1']:.3f}-{row[f'{name}_q3']:.3f})"
    faster = f"{row['times_faster']:.1f}x faster; " if "times_faster" in row else ""
    astray = f" ! left at {row['mean_exit']:.2f}" if row.get("as_forced") is False else ""
    return faster + text + astray


def _shape(row: Row) -> str:
    return f"S={row['length']}" if row["batch"] == 1 else f"B={row['batch']}, S={row['length']}"


def _name(row: Row) -> str:
    forced = row.get("forced") or []
    if len(forced) > 1:
        return f"{row['variant']} (blocks {forced[0]}-{forced[-1]}, mean {row['mean_exit']:.2f})"
    return f"{row['variant']}, block {forced[0]}" if forced else str(row["variant"])


def _verdict_line(verdict: Verdict) -> list[str]:
    target, row = verdict.target, verdict.worst
    bound = f"{'at least' if target.at_least else 'at most'} {target.bound:.2f}"
    if verdict.status == OPEN:
        return [target.what, target.size, bound, "-", OPEN]
    several = f" in {verdict.missed} of {verdict.of} rows" if verdict.missed and verdict.of > 1 else ""
    worst = f"{row[target.value]:.3f} ({_name(row)}, {_shape(row)})"
    return [target.what, target.size, bound, worst, verdict.status + several]


def _causes(key: str, rows: Sequence[Row]) -> list[list[str]]:
    """One line per length of an experiment whose rows leave alone."""
    experiment, size, device = key.split("/")
    names = {"exits": "PyTorch", "onnx": "ONNX Runtime", "onnx-int8": "ONNX Runtime int8"}
    lines = []
    for length in dict.fromkeys(row["length"] for row in rows) if experiment in names else ():
        here = [row for row in rows if row["length"] == length]
        (start, slope), fixed = _line(here, DGE), _line(here, FIXED)
        more = "in a block"  # ONNX files are measured with decisions alone
        if fixed is not None:
            more, start, slope = f"{slope - fixed[1]:.3f}", *fixed
        stock = (float(np.median([row["base_p50_ms"] for row in here])) - start) / here[0]["blocks"]
        line = [
            f"{size}, {names[experiment]}, {device}",
            str(length),
            f"{start:.2f}",
            f"{slope:.2f}",
            more,
            f"{stock:.2f}",
        ]
        lines.append(line)
    return lines


def _line(rows: Sequence[Row], variant: str) -> Any:
    """Start and slope, ms and ms per block, from block 2 on; None where there are no rows."""
    points = [(r["forced"][0], r["p50_ms"]) for r in rows if r["variant"] == variant and r["forced"][0] >= 2]
    return np.polyfit(*zip(*points, strict=True), 1)[::-1] if points else None
