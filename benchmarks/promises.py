"""What `calibrate` promises against what new data shows: validation sets drawn again and again from a pool of rows.

    python benchmarks/promises.py --divide 4000 DATA/TASK runs/TASK  # writes train.jsonl and pool.jsonl
    badge-peft train MODEL runs/TASK/train.jsonl --eval-data runs/TASK/pool.jsonl --output-dir runs/TASK/adapter
    python benchmarks/promises.py --logits TASK=runs/TASK/exit_logits.safetensors ...  # hours; goes on where it was
    python benchmarks/promises.py --docs docs/results/promises.md                      # measures nothing: the page

From each pool, `--draws` times, validation rows are drawn; `calibrate(max_score_drop=0.01)` chooses on them, and the
rest of the pool is the test data. Beside it stand the choice without cross-fitting, the fastest setting whose score
on the validation rows themselves is within the drop, and the exit that scores best on them, without leaving earlier.
Drops are in points, counted from this exit, as `calibrate` says it, and from the exit that is best on the test rows.
Of a pool of a deployed classifier (`deployed.py exits` writes them) both are full depth, its own head.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Results, calibrated, markdown, parser, pools_of, pools_option, run

from badge_peft import EarlyExitConfig
from badge_peft.evaluation import ExitLogits, evaluate_policy, exit_scores
from badge_peft.evaluation.tradeoff import search

ALLOWED = 0.01
BEST_EXIT = "best exit"
LEAST = 0.9  # of what the best single policy saves
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


def reference(rows: ExitLogits) -> tuple[int, float]:
    """The exit from which a drop is counted, and its score: a deployed model's own head, else the best exit."""
    scores = exit_scores(rows)
    return (rows.exits[-1], scores.per_exit[-1]) if rows.deployed else (scores.best_exit, scores.best)


def chosen_on_itself(rows: ExitLogits, policy: str) -> EarlyExitConfig:
    """The fastest of all settings within the drop on the rows that chose it."""
    best = reference(rows)[1]
    good = [p for p in search(rows, policy, 60, "accuracy") if p.score >= best - ALLOWED - 1e-12]
    return max(good, key=lambda p: (p.blocks_saved, p.score)).config


METHODS: dict[str, Callable[[ExitLogits, str], EarlyExitConfig]] = {
    "on itself": chosen_on_itself,
    "calibrate": lambda rows, policy: calibrated(rows, policy, max_score_drop=ALLOWED),
    BEST_EXIT: lambda rows, _: EarlyExitConfig(policy="fixed_depth", depth=reference(rows)[0]),
}


def divide(rows: int, data: Path, folder: Path) -> None:
    """Writes `rows` rows of a data set, all its splits in a random order, to train on, and the others as the pool."""
    parts = ("train", "validation", "test")
    lines = [line for name in parts for line in (data / f"{name}.jsonl").read_text("utf-8").splitlines()]
    random.Random(0).shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in (("train", lines[:rows]), ("pool", lines[rows:])):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in own), "utf-8")


def measure(options: argparse.Namespace, results: Results) -> None:
    """What the file lacks of every task, policy and size."""
    for task, file in pools_of(options):
        pool = ExitLogits.load(file)
        for policy in options.policies:
            for size in [n for n in options.sizes if n < len(pool) / 1.5]:
                key = f"{task}/{policy}/{size}"
                missing = [name for name in options.methods if name not in results.get(key, {})]
                found = draw_sets(pool, size, policy, options.draws, missing)
                results.keep(key, {**results.get(key, {}), **found})
                print(key, flush=True)


def draw_sets(pool: ExitLogits, size: int, policy: str, draws: int, methods: list[str]) -> dict[str, Any]:
    """By method, of `draws` validation sets of `size` rows: points lost above the allowed one and the blocks saved on
    the test rows, a number for each draw."""
    found: dict[str, Any] = {name: {"excess": [], "speedup": []} for name in methods}
    for draw in range(draws):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(draw))
        rows = pool.select(order[:size])
        test = pool.select(order[size:])
        best = reference(test)[1]
        for name in methods:
            point = evaluate_policy(test, METHODS[name](rows, policy))
            found[name]["excess"].append(round(100 * (best - point.score - ALLOWED), 4))
            found[name]["speedup"].append(round(point.blocks_saved, 5))
    return found


class Excess(NamedTuple):
    """Points above the allowed drop, over draws: mean, 90th percentile, and the share of the draws within it."""

    mean: float
    high: float
    within: float


def excess(methods: dict[str, Any], name: str, truly: bool) -> Excess:
    """Counted from the exit that is truly best, on the test rows, or from that which is best on the validation rows,
    whose own drops were measured in the same draws."""
    own, best = (np.array(methods[key]["excess"]) for key in (name, BEST_EXIT))
    drops = own if truly else own - best - 100 * ALLOWED
    return Excess(float(drops.mean()), float(np.quantile(drops, 0.9)), float((drops <= 1e-9).mean()))


def page(results: Results) -> str:
    """Markdown: over all tasks first, then each task."""
    parts = ["# What calibrate promises, on new data", INTRODUCTION.strip()]
    for policy in dict.fromkeys(key.split("/")[1] for key in results):
        of = {}  # (task, size) -> methods
        for key, methods in results.items():
            task, name, size = key.split("/")
            if name == policy and BEST_EXIT in methods:
                of[task, int(size)] = methods
        parts += [f"## policy={policy!r}", *_targets(of), _over_tasks(of), _each_task(of)]
    parts += _against_single(results)
    return "\n\n".join(parts) + "\n"


def _targets(of: dict[Any, Any]) -> list[str]:
    """For how many tasks and sizes the targets are reached, and for which not."""
    places = {f"{task} {size}": methods for (task, size), methods in sorted(of.items()) if "calibrate" in methods}
    parts = []
    for truly, counted in ((False, "best on the validation rows"), (True, "truly best")):
        parts.append(
            f"`calibrate`, drops from the exit that is {counted}, tasks and sizes at which the target is reached:"
        )
        said = []
        for what, field, bound in TARGETS:
            missed = [n for n in places if getattr(excess(places[n], "calibrate", truly), field) > bound]
            both = [n for n in missed if getattr(excess(places[n], BEST_EXIT, truly), field) > bound]
            some = f"; missed: {', '.join(missed)} rows" if missed else ""
            some += f" (by the best exit alone, too: {', '.join(both)} rows)" if both else ""
            reached = f"{len(places) - len(missed)} of {len(places)}"
            said.append(f"* At most {bound} points above the allowed drop {what}: {reached}{some}.")
        parts.append("\n".join(said))
    return parts


def _over_tasks(of: dict[Any, Any]) -> str:
    """A row for each size and method: the mean over tasks, and the worst of them."""
    lines = []
    for size in sorted({size for _, size in of}):
        for name in METHODS:
            mine = [methods for (_, own), methods in of.items() if own == size and name in methods]
            cells = []
            for truly in (False, True):
                mean, high, within = np.array([excess(methods, name, truly) for methods in mine]).reshape(-1, 3).T
                if not mine or name == BEST_EXIT and not truly:
                    cells += ["-"] * 3
                else:
                    cells += [f"{x.mean():+.2f} ({x.max():+.2f})" for x in (mean, high)]
                    cells += [f"{within.mean():.0%} ({within.min():.0%})"]
            if mine:
                saved = np.mean([np.mean(methods[name]["speedup"]) for methods in mine])
                lines.append([str(size), name, str(len(mine)), *cells, f"{saved:.1%}"])
    return markdown(_header(("rows", "method", "tasks"), " (worst)"), lines)


def _each_task(of: dict[Any, Any]) -> str:
    lines = []
    for (task, size), methods in sorted(of.items()):
        for name in (name for name in METHODS if name in methods):
            cells = []
            for truly in (False, True):
                mean, high, within = excess(methods, name, truly)
                dash = name == BEST_EXIT and not truly
                cells += ["-"] * 3 if dash else [f"{mean:+.2f}", f"{high:+.2f}", f"{within:.0%}"]
            draws = len(methods[name]["excess"])
            saved = np.mean(methods[name]["speedup"])
            lines.append([task, str(size), str(draws), name, *cells, f"{saved:.1%}"])
    return markdown(_header(("task", "rows", "draws", "method"), ""), lines)


def _against_single(results: Results) -> list[str]:
    """What `auto` saves, over what the single policy saves that saves most with a drop that is no larger."""
    lines, behind = [], []
    for key in (key for key in results if key.split("/")[1] == "auto"):
        task, _, size = key.split("/")
        others = {k.split("/")[1]: own for k, own in results.items() if k.split("/")[::2] == [task, size] and k != key}
        found = {name: _means(own["calibrate"]) for name, own in {"auto": results[key], **others}.items()}
        (saved, drop) = found.pop("auto")
        within = {name: own for name, own in found.items() if own[1] <= max(drop, 0.0)}
        if not within:
            continue
        best = max(within, key=lambda name: within[name][0])
        if saved < LEAST * within[best][0]:
            behind.append(f"{task} {size} rows")
        lines.append([task, size, *(f"{x[0]:.1%} ({x[1]:+.2f})" for x in ((saved, drop), within[best])), best])
    if not lines:
        return []
    said = f"At least {LEAST:.0%} of it: {len(lines) - len(behind)} of {len(lines)}"
    said += f"; less: {', '.join(behind)}." if behind else "."
    columns = ["task", "rows", "auto", "single policy", "which"]
    how = (
        "Blocks saved, and points lost above the allowed drop, means over draws. The single policy is the one that "
        "saves most of those that lose no more than is allowed, or than `auto` does."
    )
    return ["## Auto against the best single policy", how, said, markdown(columns, lines)]


def _means(method: dict[str, Any]) -> tuple[float, float]:
    return float(np.mean(method["speedup"])), float(np.mean(method["excess"]))


def _header(first: tuple[str, ...], note: str) -> list[str]:
    others = [f"90th percentile{note}", f"within it{note}"]
    counted = [f"above the allowed: mean{note}", *others, f"from the truly best: mean{note}", *others]
    return [*first, *counted, "blocks saved"]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, "runs/promises.json", threads=1)
    pools_option(options)
    options.add_argument("--draws", type=int, default=200)
    options.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[200, 500, 1000, 3000],
        help="of the validation sets",
    )
    options.add_argument("--policies", nargs="+", default=["divergence", "auto"])
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    names = ("ROWS", "FOLDER", "OUT")
    options.add_argument(
        "--divide",
        nargs=3,
        metavar=names,
        help="only divide a data set: rows to train on, a pool",
    )
    given = options.parse_args(arguments)
    if given.divide:
        rows, data, folder = given.divide
        divide(int(rows), Path(data), Path(folder))
        return 0
    return run(given, measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
