"""`plot_tradeoff`: score against blocks saved, one curve per policy, the fixed depths beside them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from badge_peft.evaluation.tradeoff import TradeOff, TradeOffPoint
from badge_peft.model_card import PERCENTAGES
from badge_peft.utils.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colors, told apart with any color vision; markers tell them apart in gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Style = dict[str, Any]
_FIXED: Style = {"color": "#555555", "linestyle": "--", "marker": "x", "markersize": 5.5, "linewidth": 1.4}
_STAR: Style = {"color": "black", "marker": "*", "markersize": 13, "linestyle": "none", "zorder": 5}
_HOLLOW: Style = {"marker": "o", "markersize": 15, "fillstyle": "none", "markeredgewidth": 2.2}
_RING: Style = {**_STAR, **_HOLLOW, "color": "#D55E00"}


def check_picture(path: str | Path) -> None:
    """Refuses a picture that could not be written, before anything is computed for it."""
    require("plots", "matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    suffix = Path(path).suffix.lower()
    if suffix and suffix.lstrip(".") not in known:
        raise ValueError(f"{path} is no picture, by its suffix {suffix!r}: it must be one of {', '.join(known)}.")


def plot_tradeoff(
    tradeoff: TradeOff,
    path: str | Path | None = None,
    title: str | None = None,
    chosen: TradeOffPoint | Mapping[str, TradeOffPoint] | None = None,
) -> Figure:
    """Draws the curves of a sweep; the fixed depths, the line that a policy has to beat, are always dashed among them.

    Nothing global is touched: no backend, no style, no current figure.

    Args:
        tradeoff: From `sweep`.
        path: Where to write the picture; its suffix says the format (png, svg, pdf). None writes nothing.
        title: Above the picture.
        chosen: A point to mark with a star, such as the calibrated setting; or two by their labels, of which the
            second has a ring.

    Returns:
        The matplotlib figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the sweep has no points.
    """
    require("plots", "matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    if not tradeoff.points:
        raise ValueError("the trade-off has no points: there is nothing to draw.")

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot(axisbelow=True)
    names = [name for name in tradeoff.names if name != "fixed_depth"]
    lines: list[tuple[str, Style]] = [
        (name, {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.8, "zorder": 3})
        for name, color, marker in zip(names, cycle(COLORS), cycle(MARKERS), strict=False)
    ]
    for name, style in [*lines, ("fixed_depth", _FIXED)]:
        curve = tradeoff.curve(name)
        label = name.replace("divergence", "DGE", 1).replace("_", " ")  # `divergence-kl t=2` reads "DGE-kl t=2"
        axes.plot([p.blocks_saved for p in curve], [p.score for p in curve], label=label, **style)
    marks = {"calibrated": chosen} if isinstance(chosen, TradeOffPoint) else chosen or {}
    for (label, point), style in zip(marks.items(), (_STAR, _RING), strict=False):
        axes.plot([point.blocks_saved], [point.score], label=label, **style)

    share = tradeoff.metric in PERCENTAGES
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    name = tradeoff.metric.replace("_", " ")
    axes.set(xlabel="blocks saved (%)", ylabel=f"{name} (%)" if share else name, title=title or "")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
