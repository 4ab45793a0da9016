"""Figure 2: score against layer speed-up of every policy, on the test logits of the stored runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from badge_peft.early_exit.policies import POLICIES as POLICIES_BY_NAME
from badge_peft.evaluation import ExitLogits, exit_scores, sweep
from badge_peft.evaluation.candidates import fitted
from paper_grid.records import Place, Record
from paper_grid.store import Store

POINTS = 24
GRID = np.linspace(0, 0.98, 50)  # speed-ups at which curves are compared and drawn


@dataclass(frozen=True)
class Policy:
    """One curve.

    Args:
        title: In figures.
        method: The method whose exits it reads.
        families: Policies whose best one, on validation data, is taken at each speed-up.
    """

    title: str
    method: str
    families: tuple[dict[str, Any], ...] = field(default=())


POLICIES = (
    Policy("DGE", "badge", tuple({"policy": "divergence", "patience": t} for t in (1, 2, 3))),
    Policy("patience", "badge", ({"policy": "patience"},)),
    Policy("entropy", "badge", ({"policy": "entropy"},)),
    Policy("max_prob", "badge", ({"policy": "max_prob"},)),
    Policy("LTE", "badge_lte", ({"policy": "learned"},)),
    Policy("agreement", "badge", ({"policy": "agreement"},)),
    Policy("fixed depth", "badge", ({"policy": "fixed_depth"},)),
    Policy("JT + patience", "joint", ({"policy": "patience"},)),
)


def policy_curves(
    records: list[Record], store: Store, place: Place, variant: dict[str, Any]
) -> dict[str, dict[int, np.ndarray]]:
    """Title -> seed -> score (per cent) at the speed-ups of `GRID`; NaN where a curve does not reach.

    Args:
        records: Of the grid.
        store: Their logits.
        place: Task, backbone, mode.
        variant: `{}`, or `{"exit_0": True}`.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for policy in POLICIES:
        for record in records:
            if record.place == place and record.method == policy.method and record.variant == variant:
                found.setdefault(policy.title, {})[record.seed] = _curve(policy, record, store)
    return found


def _curve(policy: Policy, record: Record, store: Store) -> np.ndarray:
    """The families' scores on test data, at each speed-up that of the family that is best on validation data there."""
    metric = record.settled["metric"]
    logits = {split: store.logits(record.settled, split) for split in ("validation", "test")}
    scores: dict[str, list[np.ndarray]] = {"validation": [], "test": []}
    for family in policy.families:
        fits = POLICIES_BY_NAME[family["policy"]].needs_fit
        config: Any = fitted(family, logits["validation"]) if fits else family
        for split, rows in scores.items():
            rows.append(along(logits[split], config, metric))
    if len(policy.families) == 1:
        return scores["test"][0]
    validation, test = np.stack(scores["validation"]), np.stack(scores["test"])
    ranked = np.where(np.isnan(test) | np.isnan(validation), -np.inf, validation).argmax(axis=0)
    return test[ranked, np.arange(len(GRID))]


def along(logits: ExitLogits, config: Any, metric: str) -> np.ndarray:
    """Scores at `GRID`, straight lines between the points that were found: mixing two settings reaches what lies
    between them. At a speed-up of 0 every row goes to the end."""
    name = config["policy"] if isinstance(config, dict) else config.policy
    found = sweep(logits, policies=[config if name != "fixed_depth" else "fixed_depth"], points=POINTS, metric=metric)
    fixed = name == "fixed_depth"
    points = [p for p in found.points if (p.name == "fixed_depth") == fixed]
    pairs = {0.0: [exit_scores(logits, metric).per_exit[-1]]}
    for point in points:
        if point.layer_speedup > 0:
            pairs.setdefault(round(point.layer_speedup, 9), []).append(point.score)
    x = np.array(sorted(pairs))
    y = np.array([100 * max(pairs[s]) for s in x])
    return np.interp(GRID, x, y, right=np.nan)


def at(curve: np.ndarray, saving: float) -> float:
    """The score of a curve at a speed-up; NaN where it does not reach."""
    return float(np.interp(saving, GRID, curve))


def draw(curves: dict[str, dict[int, np.ndarray]], title: str, metric: str, path: str) -> None:
    """One picture, each curve the mean over the seeds that it has.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from badge_peft.evaluation.plots import COLORS

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    titles = [policy.title for policy in POLICIES]
    for name, seeds in curves.items():
        y = np.mean(list(seeds.values()), axis=0)
        if name == "fixed depth":
            style: dict[str, Any] = {"color": "#555555", "linestyle": "--"}
        elif name == "JT + patience":
            style = {"color": COLORS[1], "linestyle": ":"}  # the color of patience
        else:
            style = {"color": COLORS[titles.index(name) % len(COLORS)]}
        axes.plot(GRID, y, label=f"{name} ({len(seeds)})", linewidth=1.8, **style)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("layer speed-up: share of blocks saved (%)")
    axes.set_ylabel(f"{metric.replace('_', ' ')} on test data (%)")
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_title(title)
    axes.legend(frameon=False, loc="best", title="curve (seeds)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
