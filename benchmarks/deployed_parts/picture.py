"""docs/img/deployed.svg from the records: score against milliseconds of each classifier, before and with exits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deployed_parts.page import LADDER, Found, Record

RUNTIMES = (
    ("PyTorch", "#2457b3", "ms"),
    ("ONNX Runtime", "#b35c00", None),
    ("ONNX Runtime int8", "#16794c", "int8_ms"),
)
FONTS = ["Helvetica", "Arial", "DejaVu Sans"]  # the last comes with matplotlib
COLUMNS, BELOW, ROOM = 3, 0.06, 0.01  # panels in a row; scores below the model's that a panel shows, and its margin


def draw(found: Sequence[Found], path: Path) -> None:
    """Writes an SVG with a panel for each classifier whose times are measured; needs matplotlib.

    In each runtime a circle is the model as it was, a dot the model with exits (means over seeds), and a dashed line
    one depth for all rows. Milliseconds are those of a text alone, logarithmic.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    timed = [own for own in found if own.clocks]
    rows = -(-len(timed) // COLUMNS)
    # the same records give the same file, whose letters are those of the other drawings
    with matplotlib.rc_context({"svg.hashsalt": "deployed", "svg.fonttype": "none", "font.sans-serif": FONTS}):
        figure = Figure(figsize=(3.4 * COLUMNS, 0.6 + 2.9 * rows), layout="constrained")
        for own, axes in zip(timed, figure.subplots(rows, COLUMNS, squeeze=False).flat, strict=False):
            for (_, color, _), line, (before, after) in zip(RUNTIMES, fixed_depths(own), points(own), strict=True):
                axes.plot(*np.transpose(line), color=color, linestyle="--", linewidth=1, alpha=0.7)
                axes.plot(*zip(before, after, strict=True), color=color, linewidth=1.6)
                axes.plot(*before, "o", color=color, markerfacecolor="white", markersize=7)
                axes.plot(*after, "o", color=color, markersize=7)
            ends = [y for pair in points(own) for _, y in pair]
            shown = [y for line in fixed_depths(own) for _, y in line if y > max(ends) - BELOW] + ends
            axes.set(title=own.title, xscale="log", ylim=(min(shown) - ROOM, max(shown) + ROOM))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.grid(True, color="#dddddd", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in figure.axes[len(timed) :]:
            axes.set_visible(False)
        figure.supxlabel("milliseconds per text")
        figure.supylabel("score on test rows")
        marks: list[Any] = [Line2D([], [], color=color, label=name, linewidth=1.6) for name, color, _ in RUNTIMES]
        for label, style in (
            ("model as it was", {"marker": "o", "markerfacecolor": "white", "linestyle": ""}),
            ("with exits", {"marker": "o", "linestyle": ""}),
            ("one depth for all", {"linestyle": "--", "linewidth": 1}),
        ):
            marks.append(Line2D([], [], color="#5b6472", label=label, **style))
        figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def points(own: Found) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """By runtime, milliseconds and score of the model as it was and with exits, means over seeds.

    All test rows are scored in float32; what a runtime adds to that or takes from it is known of the timed rows.
    """

    def at(way: str, score: float) -> tuple[float, float]:
        scores = [clock.get("scores", {}) for clock in own.clocks]
        base = LADDER[LADDER.index(way) % 2]
        shift = np.mean([each[way] - each[base] if each.get(way) is not None else 0.0 for each in scores])
        return float(np.mean([clock["one"][way] for clock in own.clocks])), score + float(shift)

    model = float(np.mean([adapter["model"] for adapter in own.adapters]))
    early = float(np.mean(own.early("0.01", "score")))
    return [(at(LADDER[i], model), at(LADDER[i + 1], early)) for i in range(0, len(LADDER), 2)]


def fixed_depths(own: Found) -> list[list[tuple[float, float]]]:
    """By runtime, milliseconds and score of each depth for all rows (seed 0).

    The first k blocks alone were timed as models of their own (`rivals`); where they were not, a depth takes its share
    of the blocks' time.
    """
    first = own.adapters[0]
    found = []
    for (_, _, key), (before, _) in zip(RUNTIMES, points(own), strict=True):
        shift = before[1] - first["model"]
        depths = [
            (m, value + shift) for m, value in zip(first["exit_layers"], first["per_exit"], strict=True) if m > 0
        ]
        found.append([(_milliseconds(own, m, before[0], key), value) for m, value in depths])
    return found


def _milliseconds(own: Found, depth: int, full: float, key: str | None) -> float:
    blocks = max(own.adapters[0]["exit_layers"])
    rivals: Record = own.others.get("rivals", {}) if key else {}
    known = {int(name.removeprefix("first ")): each[key] for name, each in rivals.items() if "first" in name}
    if not known:
        return full * depth / blocks
    known[blocks] = rivals["full"][key]
    line = np.polyfit(list(known), list(known.values()), 1)
    return full * float(np.polyval(line, depth) / np.polyval(line, blocks))
