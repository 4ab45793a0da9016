"""A picture of a search: what each trial was worth, by its number and by each setting."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

SEARCH_PICTURE = "trials.png"
_WORTH = {"score": "S-avg on held-out rows", "speed": "share of blocks saved"}


def draw_search(trials: Sequence[dict[str, Any]], search_for: str, path: Path) -> bool:
    """Draws the trials; False where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    values = [trial["value"] for trial in trials]
    names = list(trials[0]["params"])
    columns = 1 + len(names)
    figure = Figure(figsize=(2.4 * columns, 3.2), layout="constrained")
    first, *others = figure.subplots(1, columns, sharey=True)
    first.step(range(1, len(values) + 1), list(accumulate(values, max)), where="post", color="#bbbbbb")
    first.plot(range(1, len(values) + 1), values, "o", markersize=4)
    first.set(xlabel="trial", ylabel=_WORTH[search_for])
    for axes, name in zip(others, names, strict=True):
        settings = [trial["params"][name] for trial in trials]
        if isinstance(settings[0], float):
            axes.set_xscale("log")
            places: list[Any] = settings
        else:  # each in its column, in the order of numbers or of the alphabet
            known = sorted(set(settings))
            places = [known.index(setting) for setting in settings]
            axes.set_xticks(range(len(known)), [str(setting) for setting in known], rotation=30, ha="right")
        axes.plot(places, values, "o", markersize=4)
        best = values.index(max(values))
        axes.plot([places[best]], [values[best]], "*", markersize=11, color="#d62728")
        axes.set_xlabel(name.replace("_", " "))
    for axes in (first, *others):
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True
