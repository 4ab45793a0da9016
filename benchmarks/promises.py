"""What `calibrate` promises against what new data shows: validation sets drawn again and again from a pool of rows.

    badge-peft train MODEL train.jsonl --eval-data pool.jsonl --output-dir runs/TASK  # writes exit_logits.safetensors
    python benchmarks/promises.py --logits TASK=runs/TASK/exit_logits.safetensors ...  # hours; goes on where it was
    python benchmarks/promises.py --docs docs/results/promises.md                      # measures nothing: the page

From each pool, `--draws` times, validation rows are drawn; `calibrate(max_score_drop=0.01)` chooses on them, and the
rest of the pool is the test data. Beside it stand the choice without cross-fitting, the fastest setting whose score
on the validation rows themselves is within the drop, and the exit that scores best on them, without leaving earlier.
Drops are in points, counted from the exit that is best on the test rows.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pools
import torch

from badge_peft import EarlyExitConfig
from badge_peft.evaluation import ExitLogits, calibrate, evaluate_policy, exit_scores
from badge_peft.evaluation.tradeoff import search

ALLOWED = 0.01
INTRODUCTION = """
Validation rows are drawn from a pool of labeled rows, `calibrate(max_score_drop=0.01)` chooses on them, and the rest
of the pool is the test data. *on itself*: the fastest of all settings whose score on the validation rows themselves is
within a point of the best exit. *calibrate*: the drop is measured on rows that did not choose the setting
([why](../decisions/calibrate-on-other-rows.md)). *best exit*: the exit that scores best on the validation rows
answers every row, so that nothing is lost to early exits; what it loses is that these rows do not tell which exit is
best. Drops are in points of accuracy **above the allowed one**: 0 means that exactly the allowed point was lost, and
less is better. They are counted from the exit that is best on the test rows. *within it*: in how many draws at most
the allowed point was lost.

Made by

```bash
badge-peft train MODEL TASK/train.jsonl --eval-data TASK/pool.jsonl --exit-layers 0-6 --output-dir runs/TASK
python benchmarks/promises.py --logits TASK=runs/TASK/exit_logits.safetensors ...
python benchmarks/promises.py --docs docs/results/promises.md
```

on a frozen all-MiniLM-L6-v2 (6 blocks, exits 0 to 6, 3 epochs, seed 0), trained on 4,000 rows (CLINC150: 6,000) of
each task's rows in a fixed random order; all others are the pool.
"""
TARGETS = (("in the mean", 0.3), ("at the 90th percentile", 1.0))
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
    "best exit": best_exit,
}


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


def _targets(data: dict[str, Any], policy: str) -> list[str]:
    """For how many tasks and sizes the targets are reached, and for which not."""
    found, floor = (
        {
            f"{key.split('/')[0]} {key.split('/')[2]}": _figures(methods[name])[:2]
            for key, methods in sorted(data.items())
            if f"/{policy}/" in key and name in methods
        }
        for name in ("calibrate", "best exit")
    )
    said = []
    for place, (what, bound) in enumerate(TARGETS):
        missed = [name for name, figures in found.items() if figures[place] > bound]
        some = f"; missed: {', '.join(missed)} rows" if missed else ""
        if both := [name for name in missed if name in floor and floor[name][place] > bound]:
            some += f" (by the best exit alone, too: {', '.join(both)} rows)"
        said.append(
            f"* At most {bound} points above the allowed drop {what}: {len(found) - len(missed)} of {len(found)}"
            f"{some}."
        )
    return ["`calibrate`, tasks and sizes at which the target is reached:", "", *said, ""]


def _over_tasks(data: dict[str, Any], policy: str) -> list[str]:
    """A row for each size and method: the mean over tasks, and the worst of them."""
    lines = [
        "| rows | method | tasks | drop above the allowed: mean (worst) | 90th percentile (worst) | within it (worst) "
        "| blocks saved |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    sizes = sorted({int(key.split("/")[2]) for key in data if f"/{policy}/" in key})
    for size in sizes:
        of = [methods for key, methods in data.items() if key.endswith(f"/{policy}/{size}")]
        for name in METHODS:
            found = [_figures(methods[name]) for methods in of if name in methods]
            if found:
                mean, high, within, saved = np.array(found).T
                lines.append(
                    f"| {size} | {name} | {len(found)} | {mean.mean():+.2f} ({mean.max():+.2f}) "
                    f"| {high.mean():+.2f} ({high.max():+.2f}) | {within.mean():.0%} ({within.min():.0%}) "
                    f"| {saved.mean():.1%} |"
                )
    return [*lines, ""]


def _each_task(data: dict[str, Any], policy: str) -> list[str]:
    lines = [
        "| task | rows | draws | method | drop above the allowed: mean | 90th percentile | within it | blocks saved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, methods in sorted(data.items(), key=lambda item: (item[0].split("/")[0], int(item[0].split("/")[2]))):
        task, of, size = key.split("/")
        if of == policy:
            for name in (name for name in METHODS if name in methods):
                mean, high, within, saved = _figures(methods[name])
                draws = len(methods[name]["excess"])
                row = (task, size, draws, name, f"{mean:+.2f}", f"{high:+.2f}", f"{within:.0%}", f"{saved:.1%}")
                lines.append(f"| {' | '.join(map(str, row))} |")
    return [*lines, ""]


def _figures(found: dict[str, list[float]]) -> tuple[float, float, float, float]:
    """Mean and 90th percentile of the drops above the allowed one, the share of draws within it, and the mean share of
    the blocks saved."""
    excess, saved = np.array(found["excess"]), float(np.mean(found["speedup"]))
    return excess.mean(), float(np.quantile(excess, 0.9)), float((excess <= 0).mean()), saved


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
    return pools.run(parser.parse_args(arguments), measure_pool, page)


if __name__ == "__main__":
    sys.exit(main())
