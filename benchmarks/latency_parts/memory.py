"""Peak memory: a process of its own for each kind, which loads, runs two batches and says how far it got.

Run as `python -m latency_parts.memory KIND SIZE ROWS LENGTH THREADS`; all kinds import the same libraries.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from latency_parts.settings import SIZES, Settings

STOCK = "stock PyTorch"
KINDS = {
    "all-exits": "full depth, all exits",
    "nobody": "early exit, nobody leaves",
    "mixed": "each row leaves on its own",
}


def memory(size: str, settings: Settings) -> list[dict[str, object]]:
    """Peak resident memory, megabytes: median over processes, and the ratio to stock's."""
    rows: list[dict[str, object]] = []
    for count, length in settings.memory_batches:
        peaks: dict[str, list[float]] = {kind: [] for kind in ("stock", *KINDS)}
        imports: list[float] = []
        for _ in range(settings.rounds_of("memory")):
            for kind, found in peaks.items():
                said = _child(kind, size, count, length, settings.threads)
                found.append(said["peak_mb"])
                imports.append(said["imports_mb"])
        base = statistics.median(peaks["stock"])
        for kind, name in KINDS.items():
            ratios = sorted(peak / base for peak in peaks[kind])
            rows.append(
                {
                    "variant": name,
                    "base": STOCK,
                    "batch": count,
                    "length": length,
                    "peak_mb": statistics.median(peaks[kind]),
                    "base_peak_mb": base,
                    "imports_mb": statistics.median(imports),
                    "ratio": statistics.median(ratios),
                    "ratio_q1": ratios[0],
                    "ratio_q3": ratios[-1],
                    "rounds": len(ratios),
                }
            )
    return rows


def _child(kind: str, size: str, rows: int, length: int, threads: int) -> dict[str, float]:
    here = Path(__file__).resolve().parents[1]
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    command = [sys.executable, "-m", "latency_parts.memory", kind, size, str(rows), str(length), str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {kind} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(kind: str, size: str, rows: int, length: int, threads: int) -> dict[str, float]:
    """What the child does."""
    import torch

    from latency_parts import forced

    torch.set_num_threads(threads)
    imports = peak_mb()
    blocks = SIZES[size].blocks
    batch = forced.make_batch(SIZES[size], forced.spread(rows, blocks), length)
    torch.manual_seed(0)
    if kind == "stock":
        stock = forced.make_base(SIZES[size])
        call = lambda: stock(**batch)  # noqa: E731
    else:
        model = forced.build(SIZES[size], (min(length, 16),), with_stock=False).model
        rule = forced.NOBODY if kind == "nobody" else forced.RULE
        call = (lambda: model(**batch)) if kind == "all-exits" else lambda: model.early_exit_forward(**batch, **rule)
    with torch.inference_mode():
        for _ in range(2):
            call()
    return {"peak_mb": peak_mb(), "imports_mb": imports}


def peak_mb() -> float:
    """The largest resident memory that this program has had, in megabytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands `ru_maxrss` on to a child: a large parent would hide what it takes
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kilobytes here


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))))
