"""What an adapter saves on the clock: the model as it was and with exits, in PyTorch and in ONNX Runtime, in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.bench import bench_adapter

ROWS, BATCH, BATCHED_ROWS = 200, 32, 640


def time_adapter(folder: Path, test: Path, threads: int) -> dict[str, Any]:
    """Mean milliseconds of a call with one text, all ways to run it; and of one with 32 texts in PyTorch.

    Args:
        folder: Of the adapter.
        test: File of test rows.
        threads: Of torch and of each session.
    """
    adapter = open_adapter(folder)
    rows = adapter.read(test)
    one = bench_adapter(adapter, rows, limit=ROWS, threads=threads)
    many = bench_adapter(adapter, rows, limit=BATCHED_ROWS, batch_size=BATCH, threads=threads, onnx=False)
    return {"one": _means(one), "batch": _means(many), "threads": threads}


def _means(found: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a text, by what ran it."""
    return {each["name"]: 1e3 / each["examples_per_s"] for each in found["results"]}
