"""What an adapter saves on the clock: the model as it was and with exits, in PyTorch and in ONNX Runtime, in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.bench import bench_adapter

ROWS, BATCH, BATCHED_ROWS = 200, 32, 640


def time_adapter(folder: Path, test: Path, threads: int) -> dict[str, Any]:
    """Mean milliseconds and score of all ways to run one text a call; milliseconds of 32 texts a call in PyTorch."""
    adapter = open_adapter(folder)
    rows = adapter.read(test)
    one = bench_adapter(adapter, rows, limit=ROWS, threads=threads)
    many = bench_adapter(adapter, rows, limit=BATCHED_ROWS, batch_size=BATCH, threads=threads, onnx=False)
    scores = {each["name"]: each["score"] for each in one["results"]}
    return {"one": _means(one), "scores": scores, "batch": _means(many), "threads": threads}


def _means(found: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a text, by what ran it."""
    return {each["name"]: 1e3 / each["examples_per_s"] for each in found["results"]}
