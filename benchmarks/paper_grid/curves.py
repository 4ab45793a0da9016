"""Score against blocks saved, on the test logits of stored runs: every policy (Figure 2), and forms of exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from badge_peft.early_exit.policies import POLICIES as POLICIES_BY_NAME
from badge_peft.evaluation import ExitLogits, exit_scores, sweep
from badge_peft.evaluation.candidates import fitted
from paper_grid.forms import logits_of
from paper_grid.records import Place, Record
from paper_grid.store import Store

POINTS = 24
GRID = np.linspace(0, 0.98, 50)  # shares of blocks saved at which curves are compared and drawn
#: Title -> the method whose exits it reads, and policies whose best one, on validation data, is taken at each share.
POLICIES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "DGE": ("badge", [{"policy": "divergence", "patience": t} for t in (1, 2, 3)]),
    "patience": ("badge", [{"policy": "patience"}]),
    "entropy": ("badge", [{"policy": "entropy"}]),
    "max_prob": ("badge", [{"policy": "max_prob"}]),
    "LTE": ("badge_lte", [{"policy": "learned"}]),
    "agreement": ("badge", [{"policy": "agreement"}]),
    "fixed depth": ("badge", [{"policy": "fixed_depth"}]),
    "JT + patience": ("joint", [{"policy": "patience"}]),
}

Line = tuple[str, np.ndarray, dict[str, Any]]  # label, scores at `GRID`, style


def policy_curves(
    records: list[Record], store: Store, place: Place, variant: dict[str, Any]
) -> dict[str, dict[int, np.ndarray]]:
    """Title -> seed -> score (per cent) at the shares of `GRID`; NaN where a curve does not reach."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for title, (method, policies) in POLICIES.items():
        for record in records:
            if (record.place, record.method, record.variant) == (place, method, variant):
                found.setdefault(title, {})[record.seed] = _curve(policies, record, store)
    return found


def _curve(policies: list[dict[str, Any]], record: Record, store: Store) -> np.ndarray:
    """The policies' scores on test data, at each share that of the policy that is best on validation data there."""
    metric = record.settled["metric"]
    logits = {split: store.logits(record.settled, split) for split in ("validation", "test")}
    fits = POLICIES_BY_NAME[policies[0]["policy"]].needs_fit
    configs: list[Any] = [fitted(policy, logits["validation"]) if fits else policy for policy in policies]
    if len(configs) == 1:
        return along(logits["test"], configs[0], metric)
    validation, test = (np.stack([along(one, config, metric) for config in configs]) for one in logits.values())
    ranked = np.where(np.isnan(test) | np.isnan(validation), -np.inf, validation).argmax(axis=0)
    return test[ranked, np.arange(len(GRID))]


def along(logits: ExitLogits, config: Any, metric: str) -> np.ndarray:
    """Scores at `GRID`, straight lines between the points that were found: mixing two settings reaches what lies
    between them. Where nothing is saved every row goes to the end."""
    name = config["policy"] if isinstance(config, dict) else config.policy
    found = sweep(
        logits,
        policies=[config if name != "fixed_depth" else "fixed_depth"],
        points=POINTS,
        metric=metric,
    )
    pairs = {0.0: [exit_scores(logits, metric).per_exit[-1]]}
    for point in found.points:
        if point.blocks_saved > 0 and (point.name == "fixed_depth") == (name == "fixed_depth"):
            pairs.setdefault(round(point.blocks_saved, 9), []).append(point.score)
    x = np.array(sorted(pairs))
    return np.interp(GRID, x, [100 * max(pairs[share]) for share in x], right=np.nan)


def at(curve: np.ndarray, saving: float) -> float:
    """The score of a curve at a share of blocks saved; NaN where it does not reach."""
    return float(np.interp(saving, GRID, curve))


def policy_lines(curves: dict[str, dict[int, np.ndarray]]) -> list[Line]:
    """Of Figure 2, each the mean over the seeds that it has."""
    from badge_peft.evaluation.plots import COLORS

    styles = {title: {"color": COLORS[i % len(COLORS)]} for i, title in enumerate(POLICIES)}
    styles |= {
        "fixed depth": {"color": "#555555", "linestyle": "--"},
        "JT + patience": {**styles["patience"], "linestyle": ":"},
    }
    return [(f"{name} ({len(one)})", np.mean([*one.values()], axis=0), styles[name]) for name, one in curves.items()]


def form_lines(records: list[Record], store: Store, place: Place, plain: str, best: str, metric: str) -> list[Line]:
    """Two forms whose rows leave by `max_prob` (regression: DGE), and one depth for all rows of the second."""
    lines = []
    for form, what, style in (
        (best, "rows leave early", {"color": "#0b62a4"}),
        (plain, "rows leave early", {"color": "#d9702b"}),
        (best, "one depth for all", {"color": "#666666", "linestyle": "--"}),
    ):
        curves = []
        for logits in logits_of(records, form, place, store).values():
            early = "max_prob" if logits.kind != "regression" else "divergence"
            curves.append(along(logits, {"policy": early if what == "rows leave early" else "fixed_depth"}, metric))
        lines.append((f"{form}, {what}", np.mean(curves, axis=0), style))
    return lines


def draw(lines: list[Line], title: str, metric: str, path: Path) -> None:
    """One picture; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, scores, style in lines:
        axes.plot(GRID, scores, label=label, linewidth=1.8, **style)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlabel="blocks saved", ylabel=f"{metric.replace('_', ' ')} on test data (%)", title=title)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
