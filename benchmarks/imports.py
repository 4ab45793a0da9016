"""CPU time of `import badge_peft` and of `badge-peft --help` against that of `import torch, transformers, peft`.

usage: python benchmarks/imports.py [ROUNDS]

Each runs in a new interpreter, and they take turns. A time is what the kernel charged to that process, user and system
together; the ratio is the median over rounds of time / time of the same round, its quartiles beside it. A round before
the first warms the disk's cache and writes bytecode. A ratio above its bound is exit status 1.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

BASE = "import torch, transformers, peft"
BOUNDS = {"import badge_peft": 1.15, "badge-peft --help": 1.25}
CODE = {
    BASE: BASE,
    "import badge_peft": "import badge_peft",
    "badge-peft --help": "import sys; sys.argv[1:] = ['--help']; from badge_peft.cli.main import main; main()",
}


def main(rounds: int = 10) -> int:
    """Prints one line per ratio. Returns the exit status."""
    times = [{name: cpu_seconds(code) for name, code in CODE.items()} for _ in range(rounds + 1)][1:]
    print(f"{BASE}: {statistics.median(one[BASE] for one in times):.2f} s of CPU time, {rounds} rounds")
    failed = False
    for name, bound in BOUNDS.items():
        low, ratio, high = statistics.quantiles([one[name] / one[BASE] for one in times], method="inclusive")
        seconds = statistics.median(one[name] for one in times)
        print(f"{name}: {seconds:.2f} s, ratio {ratio:.3f} ({low:.3f}-{high:.3f}), bound {bound}")
        failed |= ratio > bound
    return int(failed)


def cpu_seconds(code: str) -> float:
    """User and system time of an interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
