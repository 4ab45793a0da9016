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
        store: Takes each section as it ends.
        cache: For the exported files.
        resume: Leave out what the store has.
    """
    for name in settings.sizes:
        size = _Size(settings, name, cache / name)
        for device in devices:
            for experiment in experiments:
                key = f"{experiment}/{name}/{device}"
                if (device == "cuda" and experiment not in ON_CUDA) or (resume and key in store.sections):
                    continue
                where = environment.describe(settings.threads, device)
                start = time.perf_counter()
                rows = size.run(experiment, device)
                section = {"environment": where, "seconds": time.perf_counter() - start, "rows": rows}
                store.add(key, section)
                print(section_text(key, section), flush=True)


def has_onnx() -> bool:
    """Whether the extra `onnx` is installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "badge_peft.export"))


class _Size:
    """The models of one size, made when they are first needed (the measurement of memory needs none)."""

    def __init__(self, settings: Settings, name: str, cache: Path) -> None:
        self.settings, self.name, self.cache = settings, name, cache
        self._model: forced.Forced | None = None

    def run(self, experiment: str, device: str) -> list[Any]:
        """The rows of one experiment."""
        if experiment == "memory":
            return memory(self.name, self.settings)
        if self._model is None:
            self._model = forced.build(SIZES[self.name], self.settings.lengths)
        model = self._model.to(device)
        if experiment in _TORCH:
            return _TORCH[experiment](model, self.settings, device)
        return _ONNX[experiment](model, self.settings, onnx_runs.Sessions(model, self.cache, self.settings.threads))
