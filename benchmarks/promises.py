"""What `calibrate` promises against what new data shows: validation sets drawn again and again from a pool of rows.

    python benchmarks/promises.py --divide 4000 DATA/TASK runs/TASK  # writes train.jsonl and pool.jsonl
    badge-peft train MODEL runs/TASK/train.jsonl --eval-data runs/TASK/pool.jsonl --output-dir runs/TASK/adapter
    python benchmarks/promises.py --logits TASK=runs/TASK/exit_logits.safetensors ...  # hours; goes on where it was
    python benchmarks/promises.py --docs docs/results/promises.md                      # measures nothing: the page

From each pool, `--draws` times, validation rows are drawn; `calibrate(max_score_drop=0.01)` chooses on them, and the
rest of the pool is the test data. Beside it stand the choice without cross-fitting, the fastest setting whose score
on the validation rows themselves is within the drop, and the exit that scores best on them, without leaving earlier.
Drops are in points, counted from this exit, as `calibrate` says it, and from the exit that is best on the test rows.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pools
import torch

from badge_peft import EarlyExitConfig
from badge_peft.evaluation import ExitLogits, calibrate, evaluate_policy, exit_scores
from badge_peft.evaluation.tradeoff import search

ALLOWED = 0.01
BEST_EXIT = "best exit"
INTRODUCTION = """
Validation rows are drawn from a pool of labeled rows, `calibrate(max_score_drop=0.01)` chooses on them, and the rest
of the pool is the test data. *on itself*: the fastest of all settings whose score on the validation rows themselves is
within a point of the best exit. *calibrate*: the drop is measured on rows that did not choose the setting
([why](../decisions/calibrate-on-other-rows.md)). *best exit*: the exit that scores best on the validation rows
answers every row, so that nothing is lost to early exits. Drops are in points of accuracy **above the allowed one**:
0 means that exactly the allowed point was lost, and less is better. `calibrate` counts them from the exit that is best
on the validation rows, and so is it done here; *from the truly best* counts them from the exit that is best on the
test rows, and has on top what it costs that the validation rows cannot tell which one that is. *within it*: in how
many draws at most the allowed point was lost.

Made by

```bash
python benchmarks/promises.py --divide 4000 DATA/TASK runs/TASK  # CLINC150: 6000
badge-peft train MODEL runs/TASK/train.jsonl --eval-data runs/TASK/pool.jsonl --exit-layers 0-6 --carry none \\
    --output-dir runs/TASK/adapter
python benchmarks/promises.py --policies divergence --logits TASK=runs/TASK/adapter/exit_logits.safetensors ...
python benchmarks/promises.py --policies auto --sizes 500 --logits ...
python benchmarks/promises.py --docs docs/results/promises.md
```

on a frozen all-MiniLM-L6-v2 (6 blocks, exits 0 to 6, 3 epochs, seed 0), trained on 4,000 rows (CLINC150: 6,000) of
each task's rows in a fixed random order; all others are the pool. One thread of an AMD EPYC, Python 3.11.7, torch
2.13.0, transformers 5.24.0, numpy 2.4.6, scipy 1.17.1, scikit-learn 1.9.1; commit e1471cb.
"""
TARGETS = (("in the mean", "mean", 0.3), ("at the 90th percentile", "high", 1.0))
RESULTS = "runs/promises.json"


def chosen_on_itself(rows: ExitLogits, policy: str) -> EarlyExitConfig:
    """The fastest of all settings within the drop on the rows that chose it."""
    best = exit_scores(rows).best
    good = [p for p in search(rows, policy, 60, "accuracy") if p.score >= best - ALLOWED - 1e-12]
    return max(good, key=lambda p: (p.layer_speedup, p.score)).config


def cross_fitted(rows: ExitLogits, policy: str) -> EarlyExitConfig:
    """What `calibrate` returns."""
    return calibrate(rows, policy, max_score_drop=ALLOWED)


def best_exit(rows: ExitLogits, policy: str) -> EarlyExitConfig:
    """The exit with the best score, for every row."""
    return EarlyExitConfig(policy="fixed_depth", depth=exit_scores(rows).best_exit)


METHODS: dict[str, Callable[[ExitLogits, str], EarlyExitConfig]] = {
    "on itself": chosen_on_itself,
    "calibrate": cross_fitted,
    BEST_EXIT: best_exit,
}


def divide(rows: int, data: Path, folder: Path) -> None:
    """Writes `rows` rows of a data set, all its splits in a random order, to train on, and the others as the pool."""
    parts = ("train", "validation", "test")
    lines = [line for name in parts for line in (data / f"{name}.jsonl").read_text("utf-8").splitlines()]
    random.Random(0).shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in (("train", lines[:rows]), ("pool", lines[rows:])):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in own), "utf-8")


def measure(pool: ExitLogits, size: int, policy: str, draws: int, methods: list[str]) -> dict[str, Any]:
    """`draws` validation sets of `size` rows.

    Returns:
        By method the test drops above the allowed one and the speed-ups on the test rows, a number for each draw.
    """
    found: dict[str, Any] = {name: {"excess": [], "speedup": []} for name in methods}
    for draw in range(draws):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(draw))
        rows, test = pool.select(order[:size]), pool.select(order[size:])
        best = exit_scores(test).best
        for name in methods:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = METHODS[name](rows, policy)
            point = evaluate_policy(test, config)
            found[name]["excess"].append(round(100 * (best - point.score - ALLOWED), 4))
            found[name]["speedup"].append(round(point.layer_speedup, 5))
    return found


def page(data: dict[str, Any]) -> str:
    """The tables in Markdown: over all tasks first, then each task."""
    lines = ["# What calibrate promises, on new data", "", INTRODUCTION.strip(), ""]
    for policy in dict.fromkeys(key.split("/")[1] for key in data):
        lines += [f"## policy={policy!r}", "", *_targets(data, policy), *_over_tasks(data, policy)]
        lines += _each_task(data, policy)
    return "\n".join(lines)


@dataclass(frozen=True)
class Excess:
    """Drops above the allowed one, over draws.

    Args:
        mean: In points.
        high: Their 90th percentile.
        within: Share of the draws with at most the allowed drop.
    """

    mean: float
    high: float
    within: float

    @classmethod
    def of(cls, drops: np.ndarray) -> Excess:
        """Of drops above the allowed one, in points."""
        return cls(float(drops.mean()), float(np.quantile(drops, 0.9)), float((drops <= 1e-9).mean()))


def _promised(methods: dict[str, Any], name: str) -> Excess:
    """Counted from the exit that is best on the validation rows; its own drops were measured in the same draws."""
    own, best = (np.array(methods[key]["excess"]) for key in (name, BEST_EXIT))
    return Excess.of(own - best - 100 * ALLOWED)


def _truly(methods: dict[str, Any], name: str) -> Excess:
    """Counted from the exit that is best on the test rows."""
    return Excess.of(np.array(methods[name]["excess"]))


def _targets(data: dict[str, Any], policy: str) -> list[str]:
    """For how many tasks and sizes the targets are reached, and for which not."""
    places = {
        f"{key.split('/')[0]} {key.split('/')[2]}": methods
        for key, methods in sorted(data.items())
        if f"/{policy}/" in key and {"calibrate", BEST_EXIT} <= methods.keys()
    }
    said = []
    for counted, figures in (("best on the validation rows", _promised), ("truly best", _truly)):
        said.append(
            f"`calibrate`, drops from the exit that is {counted}, tasks and sizes at which the target is reached:\n"
        )
        for what, field, bound in TARGETS:
            missed = [n for n, methods in places.items() if getattr(figures(methods, "calibrate"), field) > bound]
            some = f"; missed: {', '.join(missed)} rows" if missed else ""
            if both := [n for n in missed if getattr(figures(places[n], BEST_EXIT), field) > bound]:
                some += f" (by the best exit alone, too: {', '.join(both)} rows)"
            reached = len(places) - len(missed)
            said.append(f"* At most {bound} points above the allowed drop {what}: {reached} of {len(places)}{some}.")
        said.append("")
    return said


def _over_tasks(data: dict[str, Any], policy: str) -> list[str]:
    """A row for each size and method: the mean over tasks, and the worst of them."""
    lines = _header("rows | method | tasks", " (worst)")
    sizes = sorted({int(key.split("/")[2]) for key in data if f"/{policy}/" in key})
    for size in sizes:
        of = [methods for key, methods in data.items() if key.endswith(f"/{policy}/{size}")]
        for name in METHODS:
            mine = [methods for methods in of if {name, BEST_EXIT} <= methods.keys()]
            cells = []
            for figures in (_promised, _truly):
                found = [figures(methods, name) for methods in mine]
                if figures is _promised and name == BEST_EXIT:
                    cells += ["-", "-", "-"]
                elif found:
                    mean, high, within = (np.array([getattr(f, x) for f in found]) for x in ("mean", "high", "within"))
                    cells += [f"{mean.mean():+.2f} ({mean.max():+.2f})", f"{high.mean():+.2f} ({high.max():+.2f})"]
                    cells += [f"{within.mean():.0%} ({within.min():.0%})"]
            if mine:
                saved = np.mean([np.mean(methods[name]["speedup"]) for methods in mine])
                lines.append(f"| {' | '.join([str(size), name, str(len(mine)), *cells])} | {saved:.1%} |")
    return [*lines, ""]


def _each_task(data: dict[str, Any], policy: str) -> list[str]:
    lines = _header("task | rows | draws | method", "")
    for key, methods in sorted(data.items(), key=lambda item: (item[0].split("/")[0], int(item[0].split("/")[2]))):
        task, of, size = key.split("/")
        if of == policy and BEST_EXIT in methods:
            for name in (name for name in METHODS if name in methods):
                cells = [task, size, str(len(methods[name]["excess"])), name]
                for figures in (_promised, _truly):
                    one = figures(methods, name)
                    said = [f"{one.mean:+.2f}", f"{one.high:+.2f}", f"{one.within:.0%}"]
                    cells += ["-"] * 3 if figures is _promised and name == BEST_EXIT else said
                lines.append(f"| {' | '.join(cells)} | {np.mean(methods[name]['speedup']):.1%} |")
    return [*lines, ""]


def _header(first: str, note: str) -> list[str]:
    """Of a table, in Markdown."""
    figures = [f"mean{note}", f"90th percentile{note}", f"within it{note}"]
    columns = [*first.split(" | "), *(f"above the allowed: {x}" if x is figures[0] else x for x in figures)]
    columns += [f"from the truly best: {x}" if x is figures[0] else x for x in figures] + ["blocks saved"]
    return [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]


def measure_pool(options: argparse.Namespace, task: str, pool: ExitLogits, data: pools.Results) -> Iterator[str]:
    """What is missing of a task: every policy and size."""
    for policy in options.policies:
        for size in [n for n in options.sizes if n < len(pool) / 1.5]:
            key = f"{task}/{policy}/{size}"
            missing = [name for name in options.methods if name not in data.get(key, {})]
            data.setdefault(key, {}).update(measure(pool, size, policy, options.draws, missing))
            yield key


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = pools.parser(__doc__, draws=200, results=RESULTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[200, 500, 1000, 3000], help="of the validation sets")
    parser.add_argument("--policies", nargs="+", default=["divergence", "auto"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--divide", nargs=3, metavar=("ROWS", "FOLDER", "OUT"), help="only divide a data set: rows to train on, a pool"
    )
    options = parser.parse_args(arguments)
    if options.divide:
        rows, data, folder = options.divide
        divide(int(rows), Path(data), Path(folder))
        return 0
    return pools.run(options, measure_pool, page)


if __name__ == "__main__":
    sys.exit(main())
