"""What `policy="auto"` costs against the best single policy: validation sets drawn from the rows of stored runs.

Validation and test rows of a run are one pool, as neither was trained on. `calibrate` chooses on a few of them, and
answers the others.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.policies import POLICIES
from badge_peft.evaluation import ExitLogits, calibrate, evaluate_policy, exit_scores
from badge_peft.utils.files import write_json
from paper_grid.forms import CARRY
from paper_grid.records import Record, gather
from paper_grid.settings import Settings
from paper_grid.store import Store
from paper_grid.tables import markdown

SIZES = (200, 500, 1000)
SAVINGS = (0.66,)
ALLOWED = 0.2  # points
LEFT = 200  # rows that have to be left to be answered


def pool_of(record: Record, store: Store) -> ExitLogits:
    """All rows of a run that it was not trained on."""
    parts = [store.logits(record.settled, split) for split in ("validation", "test")]
    labels = [part.labels for part in parts]
    assert labels[0] is not None and labels[1] is not None
    logits = torch.cat([part.logits for part in parts])
    return ExitLogits(logits, torch.cat([labels[0], labels[1]]), parts[0].exits, parts[0].kind, parts[0].depth)


def singles(problem_type: str) -> list[str]:
    """The policies that are compared: those that `auto` has for exits that were not trained with LTE."""
    return [
        name
        for name, policy in POLICIES.items()
        if policy.templates(problem_type) and not policy.reads_uncertainty and name not in ("never", "fixed_depth")
    ]


def measure(records: list[Record], store: Store, path: Path, only: list[str] | None = None) -> list[dict[str, Any]]:
    """One entry for each run, number of validation rows and goal: by policy the score on the other rows, in points,
    the blocks saved there, and the drop that `calibrate` expects. What `path` holds is not measured again.

    Args:
        records: Of the method that is looked at.
        store: Their logits.
        path: The JSON file.
        only: Policies to measure; None: all of them, and `auto`.
    """
    found: list[dict[str, Any]] = json.loads(path.read_text())["entries"] if path.is_file() else []
    known = {(e["task"], e["seed"], e["rows"], e["saved"]): e for e in found}
    pools = [(record, pool_of(record, store)) for record in sorted(records, key=lambda record: record.seed)]
    for (record, pool), size, saved in product(pools, SIZES, SAVINGS):
        if len(pool) - size >= LEFT:
            key = (record.place[0], record.seed, size, saved)
            entry = known.get(key)
            if entry is None:
                entry = dict(zip(("task", "seed", "rows", "saved"), key, strict=True)) | {"policies": {}}
                found.append(entry)
            todo = [p for p in (only or ["auto", *singles(pool.kind)]) if p not in entry["policies"]]
            entry["policies"] |= dict(_answers(pool, size, saved, todo, record))
            write_json(path, {"entries": found})
    return found


def _answers(
    pool: ExitLogits, size: int, saved: float, policies: list[str], record: Record
) -> Iterator[tuple[str, dict[str, float]]]:
    rows = torch.randperm(len(pool), generator=torch.Generator().manual_seed(record.seed))
    chosen_on, others = pool.select(rows[:size]), pool.select(rows[size:])
    metric = record.settled["metric"]
    best = exit_scores(others, metric).best
    for policy in policies:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a fixed depth won is an answer like any other
            config = calibrate(chosen_on, policy, target_blocks_saved=saved, metric=metric)
        point = evaluate_policy(others, config, metric)
        yield (
            policy,
            {
                "score": 100 * point.score,
                "drop": 100 * (best - point.score),
                "saved": point.layer_speedup,
                "held_out_drop": 100 * (config.calibration or {}).get("drop", float("nan")),
            },
        )


def regrets(entries: list[dict[str, Any]], size: int) -> dict[str, float]:
    """By policy: the mean score over runs and goals less that of the best single policy, in points; of the tasks with
    labels."""
    rows = [e["policies"] for e in entries if e["rows"] == size and "max_prob" in e["policies"]]
    means = {name: float(np.mean([row[name]["score"] for row in rows])) for name in rows[0]}
    best = max(mean for name, mean in means.items() if name != "auto")
    return {name: mean - best for name, mean in means.items()}


def write_policies(settings: Settings, store: Store, path: Path, docs: Path, config: str) -> Path:
    """Measures what is missing, and writes the page.

    Raises:
        ValueError: the store holds no run of the form that is looked at.
    """
    records = [r for r in gather(settings, store)[0] if CARRY.fits(r, r.place)]
    if not records:
        raise ValueError(f"{store.root} holds no run of {CARRY.title}: start with the command `run`.")
    entries = measure(records, store, path)
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page(entries, config), encoding="utf-8")
    return docs


def page(entries: list[dict[str, Any]], config: str) -> str:
    """The measurements."""
    sizes = [size for size in SIZES if any(e["rows"] == size for e in entries)]
    found = {size: regrets(entries, size) for size in sizes}
    names = list(dict.fromkeys(name for by_policy in found.values() for name in by_policy))
    rows = [[f"`{name}`", *(_cell(entries, found[size], size, name) for size in sizes)] for name in names]
    counts = [f"{len({(e['task'], e['seed']) for e in entries if e['rows'] == size})} runs" for size in sizes]
    header = ["policy", *(f"{size} validation rows ({count})" for size, count in zip(sizes, counts, strict=True))]
    worst = min(by_policy["auto"] for by_policy in found.values())
    verdict = "reached" if worst >= -ALLOWED else f"missed, it is {-worst:.2f}"
    seeds = sorted({e["seed"] for e in entries})
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scikit-learn"))
    return f"""# What `policy="auto"` costs

`auto` should never be more than {ALLOWED} points below the best single rule on average: {verdict}.

Points below the best single rule (0.00): the mean over runs, and its standard error where it is paired with that rule.
Validation rows are drawn from the rows that a run was not trained on, `calibrate(policy, target_blocks_saved=...)`
chooses on them, for {", ".join(f"{s:.0%}" for s in SAVINGS)} of the blocks saved, and the other rows are answered.
{CARRY.title}, seeds {", ".join(map(str, seeds))}, the [tasks](../paper.md) with labels and rows enough; regression
lacks half of the rules.

{markdown(header, rows)}
```bash
python benchmarks/paper.py policies {config} --out runs/{Path(config).stem.removeprefix("paper_")}
```

{versions}.
"""


def _cell(entries: list[dict[str, Any]], by_policy: dict[str, float], size: int, name: str) -> str:
    if name not in by_policy:
        return "-"
    best = max((n for n in by_policy if n != "auto"), key=by_policy.__getitem__)
    rows = [e["policies"] for e in entries if e["rows"] == size and "max_prob" in e["policies"]]
    differences = [row[name]["score"] - row[best]["score"] for row in rows]
    error = np.std(differences, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
    return f"{by_policy[name]:.2f} ({error:.2f})" if name != best else "0.00"
