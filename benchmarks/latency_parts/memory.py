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
from typing import Any

KINDS = {
    "stock": "stock PyTorch",
    "all-exits": "full depth, all exits",
    "nobody": "early exit, nobody leaves",
    "mixed": "each row leaves on its own",
}


def memory(size: str, rows: int, length: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Peak resident memory, megabytes: median over processes, and the ratio to stock's."""
    said = {kind: [_child(kind, size, rows, length, threads) for _ in range(rounds)] for kind in KINDS}
    imports = statistics.median(one["imports_mb"] for own in said.values() for one in own)
    peaks = {kind: sorted(one["peak_mb"] for one in own) for kind, own in said.items()}
    base = statistics.median(peaks.pop("stock"))
    return [
        {
            "variant": KINDS[kind],
            "base": KINDS["stock"],
            "batch": rows,
            "length": length,
            "peak_mb": statistics.median(own),
            "base_peak_mb": base,
            "imports_mb": imports,
            "ratio": statistics.median(own) / base,
            "ratio_q1": own[0] / base,
            "ratio_q3": own[-1] / base,
            "rounds": rounds,
        }
        for kind, own in peaks.items()
    ]


def _child(*arguments: Any) -> dict[str, float]:
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "latency_parts.memory", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {arguments[0]} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(kind: str, size: str, rows: int, length: int, threads: int) -> dict[str, float]:
    """What the child does."""
    import torch

    from latency_parts.forced import NOBODY, RULE, SIZES, build, even_exits, make_base, make_batch

    torch.set_num_threads(threads)
    imports = peak_mb()
    batch = make_batch(SIZES[size], even_exits(rows, SIZES[size].blocks), length)
    if kind == "stock":
        torch.manual_seed(0)
        call: Any = make_base(SIZES[size])
    else:
        model = build(SIZES[size], (min(length, 16),), with_stock=False).model
        call = model if kind == "all-exits" else model.early_exit_forward
        batch |= {"nobody": NOBODY, "mixed": RULE}.get(kind, {})
    with torch.inference_mode():
        for _ in range(2):
            call(**batch)
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
