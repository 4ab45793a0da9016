"""From a grid to an ordered list of runs; each is a plain dict of settings, whose hash is the run's key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import product
from typing import Any

from paper_grid.methods import METHODS, SINGLE
from paper_grid.settings import Settings


@dataclass
class Run:
    """One training: the first group of the grid that asks for it, and all that decides the result except the learning
    rates."""

    group: str
    settings: dict[str, Any] = field(repr=False)

    @property
    def label(self) -> str:
        """`task/backbone/mode/method/variant/s<seed>`: what `--only` is matched with."""
        s = self.settings
        method = s["method"] + (f"@{s['depth']}" if s["depth"] else "")
        variant = ",".join(f"{k}={v}" for k, v in sorted(s["variant"].items())) or "plain"
        return f"{s['task']}/{s['backbone']}/{s['mode']}/{method}/{variant}/s{s['seed']}"

    def matches(self, pattern: str | None) -> bool:
        """Whether a shell pattern (or a part of the label or the group's name) means this run."""
        if pattern is None:
            return True
        return any(pattern in text or fnmatch(text, pattern) for text in (self.label, self.group))


def plan(settings: Settings) -> list[Run]:
    """Every run once, in the order of the groups, and in a group seed by seed, so that what is finished when the time
    is up can be compared; the groups of one round task by task."""
    runs: dict[str, tuple[tuple[int, int], Run]] = {}
    rounds: dict[int, int] = {}
    for i, group in enumerate(settings.groups):
        first = i if group.round is None else rounds.setdefault(group.round, i)
        for seed, task, backbone, mode, (method, fields), variant in product(
            group.seeds, group.tasks, group.backbones, group.modes, group.named_methods, group.variants
        ):
            place = first, 0 if group.round is None else list(settings.tasks).index(task)
            for one in _runs(settings, task, backbone, mode, method, {**fields, **variant}, seed):
                runs.setdefault(key_of(one), (place, Run(group.name, one)))
    return [run for _, run in sorted(runs.values(), key=lambda found: found[0])]


def _runs(
    settings: Settings, task: str, backbone: str, mode: str, method: str, variant: dict[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    if method not in SINGLE:
        yield make_run(settings, task, backbone, mode, method, variant, seed)
        return
    blocks = settings.backbones[backbone].blocks
    for depth in [blocks] if method == "single_final" else range(blocks, 0, -1):
        yield make_run(settings, task, backbone, mode, "single", variant, seed, depth)


def make_run(
    settings: Settings,
    task: str,
    backbone: str,
    mode: str,
    method: str,
    variant: dict[str, Any],
    seed: int,
    depth: int | None = None,
) -> dict[str, Any]:
    """The settings of one run; behind block `depth` of a single exit the model is cut off."""
    if method == "badge" and variant.get("placement") == "none":  # that is what JT is
        method = "joint"
        variant = {k: v for k, v in variant.items() if k != "placement"}
    t = settings.tasks[task]
    b = settings.backbones[backbone]
    adapter = {"r": settings.r, "activation": t.activation or settings.activation, **METHODS[method].adapter}
    adapter |= {"exit_pooling": b.pooling, "final_exit": b.final_exit, "backbone": mode}
    if adapter.get("exit_type") == "past_future":
        adapter["final_exit"] = "exit"
    fields = {k: v for k, v in variant.items() if k != "exit_0"}
    # A variant that says what the method says anyway is no variant.
    variant = {k: v for k, v in variant.items() if (v if k == "exit_0" else adapter.get(k) != v)}
    adapter |= fields
    if adapter["placement"] == "none":  # no bypass: its size and activation mean nothing
        adapter |= {"r": settings.r, "activation": settings.activation}
        variant.pop("r", None)
    return {
        "task": task,
        "data": t.data,
        "metric": t.metric,
        "rows": {"train": t.max_train, "validation": t.max_validation, "test": t.max_test},
        "data_seed": settings.data_seed,
        "max_length": t.max_length,
        "backbone": backbone,
        "source": b.source,
        "blocks": b.blocks,
        "freeze_embeddings": b.freeze_embeddings and mode == "full",
        "mode": mode,
        "method": method,
        "objective": METHODS[method].objective,
        "depth": depth,
        "variant": variant,
        "adapter": adapter,
        "exit_0": bool(variant.get("exit_0")),
        "epochs": t.epochs or settings.epochs,
        "patience": settings.patience,
        "batch_size": t.batch_size or settings.batch_size,
        "bf16": settings.bf16,
        "seed": seed,
        "purpose": "result",
        **({"training": METHODS[method].training} if METHODS[method].training else {}),
    }


def key_of(settings: dict[str, Any]) -> str:
    """A hash of the settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
