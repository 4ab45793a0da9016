"""Measures what the simulation starts from: seconds of batches in a replica's engine, and where which text stops."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits
from badge_peft.evaluation.curve import stored_curve
from badge_peft.hub import LOGITS
from badge_peft.serving.engine import Engine
from badge_peft.serving.settings import MAIN
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.stream import read_texts

SIZES = (1, 2, 4, 8, 16, 32)
FULL = "full depth"


def measure(
    adapter: str, texts: str, repeats: int, threads: int, seed: int, logits: str | None = None
) -> dict[str, Any]:
    """Times `Engine.predict`, tokens and answers included, at full depth and at every point of the adapter's curve. Of
    one thread the seconds are the processor's, which other programs of the machine do not lengthen.

    Args:
        adapter: A calibrated adapter.
        texts: File of the texts to time.
        repeats: Batches of each size and setting.
        threads: Of torch.
        seed: Of the draws.
        logits: File of exit logits, whose rows requests are drawn from. None: what `badge-peft train` left in the
            adapter's folder.

    Returns:
        `batches`, of each its `setting` (`full depth`, or the number of a point), `exits` and `seconds`; `rows`, see
        `rows_of`; and what was measured.
    """
    engine = Engine(adapter, threads=threads)
    own = engine.configs[MAIN]
    settings: list[tuple[Any, EarlyExitConfig]] = [(FULL, EarlyExitConfig(policy="never"))]
    settings += list(enumerate(point.config for point in stored_curve(own)))
    rows = [row for row, _ in zip(read_texts(texts), range(4000), strict=False)]
    draw, batches = random.Random(seed), []
    clock = time.thread_time if threads == 1 else time.perf_counter
    for config in (settings[0][1], settings[-1][1]):  # warm
        engine.predict(rows[:32], {MAIN: config})
    for size in SIZES:
        for _ in range(repeats):
            batch = draw.sample(rows, size)
            for name, config in draw.sample(settings, len(settings)):  # in turn: drift of the clock hits all alike
                start = clock()
                answers = engine.predict(batch, {MAIN: config})
                seconds = clock() - start
                exits = [answer["exit_layer"] for answer in answers]
                batches.append({"setting": name, "exits": exits, "seconds": seconds})
    stored = ExitLogits.load(logits or Path(adapter) / LOGITS)
    return {
        "batches": batches,
        "depth": stored.depth,
        "early_exit": own.to_dict(),
        "rows": rows_of(stored, own),
        "threads": threads,
        "repeats": repeats,
        "seed": seed,
    }


def rows_of(stored: ExitLogits, own: EarlyExitConfig) -> dict[str, Any]:
    """Of the evaluation's rows: `exits` and `right` (without labels: as full depth says) at each point of the curve,
    `full_right`, and `hard`, the quarter of which full depth is least sure."""
    problem, full = problem_of(stored.kind), stored.logits[:, -1]
    labels = problem.predictions(full) if stored.labels is None else stored.labels.numpy()
    found: dict[str, list[Any]] = {"exits": [], "right": []}
    for config in (point.config for point in stored_curve(own)):
        stops = torch.from_numpy(build_policy(config).replay_history(stored.history()))
        found["exits"].append(stops.tolist())
        found["right"].append((problem.predictions(stored.answers(stops)) == labels).tolist())
    sure = full.softmax(-1).amax(-1)
    hard = torch.zeros(len(stored), dtype=torch.bool)
    hard[sure.argsort()[: len(stored) // 4]] = True
    return {**found, "full_right": (problem.predictions(full) == labels).tolist(), "hard": hard.tolist()}
