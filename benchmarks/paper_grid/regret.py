"""What `policy="auto"` costs against the best single policy: validation sets drawn from the rows of stored runs.

Validation and test rows of a run are one pool, as neither was trained on. `calibrate` chooses on a few of them, and
answers the others.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import calibrated, markdown, verdict

from badge_peft.early_exit.policies import POLICIES
from badge_peft.evaluation import ExitLogits, evaluate_policy
from badge_peft.utils.files import write_json
from paper_grid.forms import CARRY, is_of
from paper_grid.records import Record, gather
from paper_grid.settings import Settings
from paper_grid.store import Store

SIZES = (200, 500, 1000)
SAVED = 0.66  # of the blocks
ALLOWED = 0.2  # points
LEFT = 200  # rows that have to be left to be answered


def pool_of(record: Record, store: Store) -> ExitLogits:
    """All rows of a run that it was not trained on."""
    first, second = (store.logits(record.settled, split) for split in ("validation", "test"))
    assert first.labels is not None and second.labels is not None
    logits = torch.cat([first.logits, second.logits])
    labels = torch.cat([first.labels, second.labels])
    return ExitLogits(logits, labels, first.exits, first.kind, first.depth)


def singles(problem_type: str) -> list[str]:
    """The policies that are compared: those that `auto` has for exits that were not trained with LTE."""
    return [
        name
        for name, policy in POLICIES.items()
        if policy.templates(problem_type) and not policy.reads_uncertainty and name not in ("never", "fixed_depth")
    ]


def measure(records: list[Record], store: Store, path: Path) -> list[dict[str, Any]]:
    """One entry for each run and number of validation rows: by policy the score on the other rows, in points, and the
    blocks saved there. What the JSON file at `path` holds is not measured again."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["entries"] if path.is_file() else []
    known = {(e["task"], e["seed"], e["rows"]) for e in found}
    for record, size in product(sorted(records, key=lambda record: record.seed), SIZES):
        pool = pool_of(record, store)
        if len(pool) - size >= LEFT and (record.place[0], record.seed, size) not in known:
            entry = {"task": record.place[0], "seed": record.seed, "rows": size}
            found.append({**entry, "policies": _answers(pool, size, record)})
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"entries": found})
    return found


def _answers(pool: ExitLogits, size: int, record: Record) -> dict[str, dict[str, float]]:
    rows = torch.randperm(len(pool), generator=torch.Generator().manual_seed(record.seed))
    chosen_on = pool.select(rows[:size])
    others = pool.select(rows[size:])
    metric, found = record.settled["metric"], {}
    for policy in ("auto", *singles(pool.kind)):
        config = calibrated(chosen_on, policy, target_blocks_saved=SAVED, metric=metric)
        point = evaluate_policy(others, config, metric)
        found[policy] = {"score": 100 * point.score, "saved": point.blocks_saved}
    return found


def regrets(entries: list[dict[str, Any]], size: int) -> dict[str, float]:
    """By policy: the mean score over runs and goals less that of the best single policy, in points; of the tasks with
    labels."""
    rows = [e["policies"] for e in entries if e["rows"] == size and "max_prob" in e["policies"]]
    means = {name: float(np.mean([row[name]["score"] for row in rows])) for name in rows[0]}
    best = max(mean for name, mean in means.items() if name != "auto")
    return {name: mean - best for name, mean in means.items()}


def write_policies(settings: Settings, store: Store, path: Path, docs: Path, config: str) -> Path:
    """Measures what is missing, and writes the page."""
    records = [r for r in gather(settings, store)[0] if is_of(r, CARRY, r.place)]
    if not records:
        raise ValueError(f"{store.root} holds no run of {CARRY}: start with the command `run`.")
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
    seeds = sorted({e["seed"] for e in entries})
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scikit-learn"))
    return f"""# What `policy="auto"` costs

`auto` should never be more than {ALLOWED} points below the best single policy on average:
{verdict(worst >= -ALLOWED)}, it is {-worst:.2f}.

Points against the best single policy (0.00), negative where a policy is worse: the mean over runs, and its standard
error where it is paired with that policy.
Validation rows are drawn from the rows that a run was not trained on, `calibrate(policy, target_blocks_saved=...)`
chooses on them, for {SAVED:.0%} of the blocks saved, and the other rows are answered.
{CARRY}, seeds {", ".join(map(str, seeds))}, the [tasks](../paper.md) with labels and rows enough; regression
lacks half of the policies.

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
