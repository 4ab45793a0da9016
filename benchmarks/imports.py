"""CPU time of `import badge_peft` and of `badge-peft --help` against that of `import torch, transformers, peft`.

usage: python benchmarks/imports.py [--rounds 10] [--check]

Each runs in a new interpreter, and they take turns. A time is what the kernel charged to that process, user and system
together; the ratio is the median over rounds of time / time of the same round, its quartiles beside it. A round before
the first warms the disk's cache and writes bytecode. With --check, a ratio above its bound is exit status 1.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    """Prints one line per ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for code in CODE.values():
        cpu_seconds(code)
    times: dict[str, list[float]] = {name: [] for name in CODE}
    for _ in range(args.rounds):
        for name, code in CODE.items():
            times[name].append(cpu_seconds(code))
    base = times.pop(BASE)
    print(f"{BASE}: {statistics.median(base):.2f} s of CPU time, {args.rounds} rounds")
    failed = False
    for name, bound in BOUNDS.items():
        ratios = sorted(t / b for t, b in zip(times[name], base, strict=True))
        ratio, quarter = statistics.median(ratios), len(ratios) // 4
        print(
            f"{name}: {statistics.median(times[name]):.2f} s, ratio {ratio:.3f} "
            f"({ratios[quarter]:.3f}-{ratios[-quarter - 1]:.3f}), bound {bound}"
        )
        failed |= ratio > bound
    if args.check and failed:
        raise SystemExit(1)


def cpu_seconds(code: str) -> float:
    """User and system time of an interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
