"""`plot_tradeoff`: score against layer speed-up, one curve per policy, the fixed depths beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from badge_peft.evaluation.tradeoff import TradeOff
from badge_peft.utils.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colors, told apart with any color vision; markers tell them apart in gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FIXED = "fixed_depth"
_SHARES = ("accuracy", "f1", "acc_and_f1", "macro_f1")  # scores in [0, 1] that are read as per cent


def plot_tradeoff(
    tradeoff: TradeOff,
    path: str | Path | None = None,
    title: str | None = None,
    chosen: Any = None,
) -> Figure:
    """Draws the curves of a sweep; the fixed depths, the line that a policy has to beat, are always dashed among them.

    Nothing global is touched: no backend, no style, no current figure.

    Args:
        tradeoff: From `sweep`.
        path: Where to write the picture; its suffix says the format (png, svg, pdf). None writes nothing.
        title: Above the picture.
        chosen: A `TradeOffPoint` to mark with a star, such as the calibrated setting.

    Returns:
        The matplotlib figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the sweep has no points.
    """
    require("plots", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    if not tradeoff.points:
        raise ValueError("the trade-off has no points: there is nothing to draw.")

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [name for name in tradeoff.names if name != FIXED]
    for i, name in enumerate(names):
        style: dict[str, Any] = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5,
        }
        axes.plot(*_points(tradeoff, name), label=_label(name), linewidth=1.8, zorder=3, **style)
    fixed: dict[str, Any] = {
        "color": "#555555",
        "linestyle": "--",
        "marker": "x",
        "markersize": 5.5,
        "linewidth": 1.4,
        "zorder": 2,
    }
    axes.plot(*_points(tradeoff, FIXED), label=_label(FIXED), **fixed)
    if chosen is not None:
        star: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 13, "linestyle": "none", "zorder": 4}
        axes.plot([chosen.layer_speedup], [chosen.score], label="calibrated", **star)

    share = tradeoff.metric in _SHARES
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlabel("layer speed-up: share of blocks saved (%)")
    axes.set_ylabel(f"{tradeoff.metric.replace('_', ' ')}{' (%)' if share else ''}")
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="best")
    if title:
        axes.set_title(title)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _points(tradeoff: TradeOff, name: str) -> tuple[list[float], list[float]]:
    curve = tradeoff.curve(name)
    return [point.layer_speedup for point in curve], [point.score for point in curve]


def _label(name: str) -> str:
    """`divergence-kl t=2` reads "DGE-kl t=2"."""
    return name.replace("divergence", "DGE", 1).replace("_", " ")
