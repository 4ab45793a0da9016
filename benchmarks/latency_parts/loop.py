"""From what is to be measured to sections of the result file, size by size: one model at a time is in memory."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latency_parts import environment, forced, onnx_runs, torch_runs
from latency_parts.memory import memory
from latency_parts.page import section_text
from latency_parts.settings import ON_CUDA, SIZES, Settings
from latency_parts.store import Store

_TORCH: dict[str, Callable[..., Any]] = {
    "full-depth": torch_runs.full_depth,
    "exits": torch_runs.exits,
    "batch": torch_runs.batches,
}
_ONNX: dict[str, Callable[..., Any]] = {
    "onnx": onnx_runs.exits,
    "onnx-int8": partial(onnx_runs.exits, int8=True),
    "onnx-batch": onnx_runs.batches,
    "int8-vs-stock": onnx_runs.int8_against_stock,
}


def measure(
    settings: Settings, experiments: Sequence[str], devices: Sequence[str], store: Store, cache: Path, resume: bool
) -> None:
    """Measures, prints and stores every experiment on every size and device.

    Args:
        settings: What is measured.
        experiments: Names in `EXPERIMENTS`.
        devices: `cpu`, `cuda`.
        store: Takes each shape of a section as it ends.
        cache: For the exported files.
        resume: Leave out the shapes that the store has.
    """
    for name in settings.sizes:
        size = _Size(settings, name, cache / name)
        for device in devices:
            for experiment in experiments:
                key = f"{experiment}/{name}/{device}"
                if device == "cuda" and experiment not in ON_CUDA:
                    continue
                where = environment.describe(settings.threads, device)
                section = {"environment": where, "seconds": 0.0, "cells": [], "rows": []}
                if resume:
                    section = store.sections.get(key, section)
                left = [(cell, part) for cell, part in settings.cells(experiment) if cell not in section["cells"]]
                for cell, part in left:
                    start = time.perf_counter()
                    section["rows"] += size.run(part, experiment, device)
                    section["cells"].append(cell)
                    section["seconds"] += time.perf_counter() - start
                    store.add(key, section)
                if left:
                    print(section_text(key, section), flush=True)


def has_onnx() -> bool:
    """Whether the extra `onnx` is installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "badge_peft.export"))


class _Size:
    """The models of one size, made when they are first needed (the measurement of memory needs none)."""

    def __init__(self, settings: Settings, name: str, cache: Path) -> None:
        self.settings, self.name, self.cache = settings, name, cache
        self._model: forced.Forced | None = None
        self._sessions: onnx_runs.Sessions | None = None

    def run(self, settings: Settings, experiment: str, device: str) -> list[Any]:
        """The rows of one experiment, of the shapes in `settings`."""
        if experiment == "memory":
            return memory(self.name, settings)
        if self._model is None:
            self._model = forced.build(SIZES[self.name], self.settings.lengths)
        model = self._model.to(device)
        if experiment in _TORCH:
            return _TORCH[experiment](model, settings, device)
        if self._sessions is None:
            self._sessions = onnx_runs.Sessions(model, self.cache, settings.threads)
        return _ONNX[experiment](model, settings, self._sessions)
