"""Score against blocks saved: full depth, the plain bypass, the best form, and one depth for all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from paper_grid.curves import GRID, along
from paper_grid.forms import Form, logits_of
from paper_grid.records import Place, Record
from paper_grid.settings import Settings
from paper_grid.store import Store
from paper_grid.tables import place_title


def draw_forms(
    settings: Settings, records: list[Record], store: Store, place: Place, forms: tuple[Form, Form], path: Path
) -> None:
    """Writes one picture; each curve is the mean over seeds, its rows stopped by `max_prob` (regression: DGE).

    Args:
        settings: The grid.
        records: Its runs.
        store: Their logits.
        place: The task.
        forms: The plain bypass and the one that is compared; the second's fixed depths are drawn.
        path: A PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    metric = settings.tasks[place[0]].metric
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: list[tuple[str, Form, str, dict[str, Any]]] = [
        (f"{forms[1].title}, rows leave early", forms[1], "exit", {"color": "#0b62a4", "linewidth": 2.2}),
        (f"{forms[0].title}, rows leave early", forms[0], "exit", {"color": "#d9702b", "linewidth": 1.8}),
        (f"{forms[1].title}, one depth for all", forms[1], "fixed_depth", {"color": "#666666", "linestyle": "--"}),
    ]
    for title, form, rule, style in lines:
        curves = []
        for logits in logits_of(records, form, place, store, "test").values():
            policy = rule if rule == "fixed_depth" else "max_prob" if logits.kind != "regression" else "divergence"
            curves.append(along(logits, {"policy": policy}, metric))
        axes.plot(GRID, np.mean(curves, axis=0), label=title, **style)
        if rule == "exit" and form == forms[1]:
            axes.axhline(float(np.mean(curves, axis=0)[0]), color="#999999", linewidth=0.9, linestyle=":")
            axes.annotate(
                "full depth", (0.985, np.mean(curves, axis=0)[0]), fontsize=8, color="#777777", ha="right", va="bottom"
            )
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(0, 0.9)
    axes.set_xlabel("blocks saved")
    axes.set_ylabel(f"{metric.replace('_', ' ')} on test data (%)")
    axes.set_title(place_title(settings, place), fontsize=10)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
