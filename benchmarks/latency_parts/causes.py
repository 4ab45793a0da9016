"""Where the time goes: a line through the times of the exits, for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latency_parts.tables import Table
from latency_parts.torch_runs import DGE, FIXED

TEXT = """The times above, batch 1, as straight lines over the block k at which a row leaves (least squares): *outside
of the blocks* is where the line of `fixed_depth` starts (embeddings, masks, the call), *a block* its slope, *an exit
and its decision* how much steeper the line of DGE is. *Stock* is what remains of the stock model's time when the first
is taken from it, per block.

A row that leaves at block k pays for all that is outside of the blocks, but the ratio allows it k/M of that: at block
2 of 12 this alone is 5/6 of the first number over the time of two blocks. The rest of a ratio above 1 is the exit and
its decision over a block. Both weigh more the smaller a block is: few tokens, narrow models, int8."""


def causes(sections: Mapping[str, Any]) -> Table | None:
    """One line per model, runtime and length; None where the exits have not been measured."""
    lines = []
    for key, section in sections.items():
        experiment, size, device = key.split("/")
        if experiment not in ("exits", "onnx", "onnx-int8"):
            continue
        rows = [row for row in section["rows"] if len(row.get("forced") or []) == 1 and row["batch"] == 1]
        runtime = {"exits": "PyTorch", "onnx": "ONNX Runtime", "onnx-int8": "ONNX Runtime int8"}[experiment]
        for length in dict.fromkeys(row["length"] for row in rows):
            here = [row for row in rows if row["length"] == length]
            lines.append([f"{size}, {runtime}, {device}", str(length), *_cells(here)])
    header = ["", "tokens", "outside of the blocks, ms", "a block, ms", "an exit and its decision, ms", "stock, ms"]
    return (header, lines) if lines else None


def _cells(rows: list[Mapping[str, Any]]) -> list[str]:
    decided, fixed = (_line([row for row in rows if row["variant"] == variant]) for variant in (DGE, FIXED))
    start, slope = decided if fixed is None else fixed  # ONNX files are measured with decisions alone
    base = float(np.median([row["base_p50_ms"] for row in rows]))
    more = "in a block" if fixed is None else f"{decided[1] - slope:.3f}"
    return [f"{start:.2f}", f"{slope:.2f}", more, f"{(base - start) / rows[0]['blocks']:.2f}"]


def _line(rows: list[Mapping[str, Any]]) -> Any:
    """Start and slope, ms and ms per block, from block 2 on; None where there are no two points."""
    points = [(row["forced"][0], row["p50_ms"]) for row in rows if row["forced"][0] >= 2]
    if len(points) < 2:
        return None
    slope, start = np.polyfit(*zip(*points, strict=True), 1)
    return float(start), float(slope)
