"""Stored rows as tables, for the terminal and for the page: one line per variant and exit, one column per shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latency_parts.targets import OPEN, Verdict

Row = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]


def markdown(table: Table) -> str:
    """A table of a page."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratios(rows: Sequence[Row]) -> Table:
    """Medians of the ratio, quartiles in brackets; a `!` marks rows that did not leave where they should."""
    return _pivot(rows, _ratio)


def limits(rows: Sequence[Row]) -> Table:
    """The same against the limit that can be reached; no lines where it was not measured."""
    found = [row for row in rows if "limit_ratio" in row]
    return _pivot(found, lambda row: _ratio(row, "limit_ratio"))


def times(rows: Sequence[Row]) -> Table:
    """Milliseconds, median / 95th percentile; first those of what is compared with, from the same rounds."""
    header, lines = _pivot(rows, lambda row: f"{row['p50_ms']:.2f} / {row['p95_ms']:.2f}")
    columns = _columns(rows)
    base, outside = [], []
    for column in columns:
        found = [row for row in rows if _column(row) == column]
        middle, slow = (sorted(row[f"base_{q}_ms"] for row in found)[len(found) // 2] for q in ("p50", "p95"))
        base.append(f"{middle:.2f} / {slow:.2f}")
        outside += [f"{row['outside_p50_ms']:.2f}" for row in found[:1] if "outside_p50_ms" in row]
    first = [[rows[0]["base"], *base], *([["the same without its blocks", *outside]] if outside else [])]
    return header, [*first, *lines]


def megabytes(rows: Sequence[Row]) -> Table:
    """Peak memory, in the place of times; what the imported libraries take is in every line."""
    header, lines = _pivot(rows, lambda row: f"{row['peak_mb']:.0f} MB")
    base = {_column(row): f"{row['base_peak_mb']:.0f} MB" for row in rows}
    imports = {_column(row): f"{row['imports_mb']:.0f} MB" for row in rows}
    first = [
        ["the imported libraries alone", *(imports[column] for column in _columns(rows))],
        [rows[0]["base"], *(base[column] for column in _columns(rows))],
    ]
    return header, [*first, *lines]


def verdicts(found: Sequence[Verdict]) -> Table:
    """Every target with its bound, the worst row, and whether all its rows are within the bound."""
    lines = []
    for verdict in found:
        target = verdict.target
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:.2f}"
        worst, status = "-", verdict.status
        if verdict.worst is not None and status != OPEN:
            value = verdict.worst[target.value]
            worst = f"{value:.3f} ({_name(verdict.worst)}, {_column(verdict.worst)})"
            if verdict.missed and verdict.of > 1:
                status += f" in {len(verdict.missed)} of {verdict.of} rows"
        lines.append([target.what, target.size, bound, worst, status])
    return ["target", "model", "bound", "worst row measured", "result"], lines


def _ratio(row: Row, name: str = "ratio") -> str:
    text = f"{row[name]:.3f} ({row[f'{name}_q1']:.3f}-{row[f'{name}_q3']:.3f})"
    if "times_faster" in row:
        text = f"{row['times_faster']:.1f}x faster; {text}"
    if row.get("as_forced") is False:
        text += f" ! left at {row['mean_exit']:.2f}"
    return text


def _pivot(rows: Sequence[Row], cell: Callable[[Row], str]) -> Table:
    columns, names = _columns(rows), list(dict.fromkeys(_name(row) for row in rows))
    cells = {(_name(row), _column(row)): cell(row) for row in rows}
    return ["", *columns], [[name, *(cells.get((name, column), "-") for column in columns)] for name in names]


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(_column(row) for row in rows))


def _column(row: Row) -> str:
    return f"S={row['length']}" if row["batch"] == 1 else f"B={row['batch']}, S={row['length']}"


def _name(row: Row) -> str:
    forced = row.get("forced")
    if not forced or row["share"] == 1.0 and forced[0] == row["blocks"] and "full" in row["variant"]:
        return str(row["variant"])
    if len(forced) > 1:
        return f"{row['variant']} (blocks {forced[0]}-{forced[-1]}, mean {row['mean_exit']:.2f})"
    return f"{row['variant']}, block {forced[0]}"
