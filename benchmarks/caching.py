"""What cached states save: `badge-peft train` with a frozen backbone, with them and without, in turn.

Each training is a process of its own, the whole command from the import to the report. Reads a model and texts by
path; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TIMES = {
    "cpu_seconds": "whole command, processor",
    "seconds": "whole command, clock",
    "training_seconds": "training alone, clock",
}
TARGET = 4.0
WAYS = {"cached": [], "uncached": ["--no-cache-states"]}


def main() -> None:
    """Runs what `--help` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an encoder or classifier")
    parser.add_argument("data", type=Path, nargs="+", help="files of labeled texts")
    parser.add_argument("--name", help="of the model, on the page")
    parser.add_argument("--rows", type=int, default=10_000, help="of each file; a fifth is for evaluation")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("runs/caching.json"), help="where the measurements go")
    parser.add_argument("--docs", type=Path, help="also write the page")
    parser.add_argument("--report", action="store_true", help="measure nothing: write the page of what was measured")
    options = parser.parse_args()
    if not options.report:
        measure(options)
    stored = json.loads(options.json.read_text())
    print(page(stored))
    if options.docs is not None:
        options.docs.write_text(page(stored), encoding="utf-8")


def measure(options: argparse.Namespace) -> None:
    """Trains, and writes the file after every run."""
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        for data in options.data:
            for way, arguments in WAYS.items():
                runs.append(
                    {"data": data.parent.name, "way": way, "repeat": repeat, **train(options, data, arguments)}
                )
                print(json.dumps(runs[-1]), flush=True)
                versions = {name: version(name) for name in ("torch", "transformers", "peft")}
                stored = {
                    "model": options.name or Path(options.model).name,
                    "epochs": options.epochs,
                    "threads": options.threads,
                    "python": platform.python_version(),
                    "versions": versions,
                    "runs": runs,
                }
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(stored, indent=2) + "\n")


def train(options: argparse.Namespace, data: Path, arguments: list[str]) -> dict[str, Any]:
    """One command: its seconds, those of the training alone, and its scores."""
    command = [sys.executable, "-m", "badge_peft.cli", "train", options.model, str(data)]
    command += ["--max-rows", str(options.rows), "--epochs", str(options.epochs), "--latency", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with TemporaryDirectory() as folder:
        start, cpu, load = time.perf_counter(), cpu_seconds(), os.getloadavg()[0]
        subprocess.run(
            [*command, "--output-dir", folder, *arguments],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        report = json.loads((Path(folder) / "report.json").read_text())
    scores = {name: report[name] for name in ("s_avg", "s_best", "training_seconds", "states", "train_rows")}
    return {"seconds": seconds, "cpu_seconds": cpu, "load": load, **scores}


def cpu_seconds() -> float:
    """What the commands so far took of the processor, whatever else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def page(stored: dict[str, Any]) -> str:
    """The measurements as a page of the documentation."""
    lines = []
    for data in dict.fromkeys(run["data"] for run in stored["runs"]):
        found = {way: [r for r in stored["runs"] if (r["data"], r["way"]) == (data, way)] for way in WAYS}
        for name, what in TIMES.items():
            cached, uncached = ([r[name] for r in found[way]] for way in WAYS)
            ratios = [b / a for a, b in zip(cached, uncached, strict=False)]
            cells = [data, what, spread(uncached, "s"), spread(cached, "s"), spread(ratios, "x")]
            lines.append(f"| {' | '.join(cells)} |")
        scores = [spread([100 * r["s_avg"] for r in found[way]], "") for way in reversed(WAYS)]
        size = found["cached"][0]["states"]["bytes"] / 1e9
        lines.append(f"| {data} | S-avg; states | {scores[0]} | {scores[1]}; {size:.2f} GB | |")
    first, repeats = stored["runs"][0], 1 + max(run["repeat"] for run in stored["runs"])
    versions = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
    loads = [run["load"] for run in stored["runs"]]
    counted = "One run of each" if repeats == 1 else f"Medians of {repeats} runs, and their range"
    rows, newline = f"{first['train_rows']:,}", "\n"
    return f"""# Cached states

What they save when exits are trained on a frozen backbone ([Training](../training.md#cached-states)):
`badge-peft train {stored["model"]} DATA --epochs {stored["epochs"]}`, {rows} texts to train on, with and without
`--no-cache-states`, taking turns, each in a process of its own. {counted}.

| texts | | uncached | cached | times faster |
|---|---|---|---|---|
{newline.join(lines)}

The target was a whole command {TARGET:.0f} times faster, by the processor's time: {verdict(stored["runs"])}.

The whole command also reads and encodes the texts, runs the evaluation rows once, and calibrates. The scores differ
as cached training has no dropout in the backbone.

{stored["threads"]} thread(s) of a CPU, load of the machine before a run {min(loads):.1f} to {max(loads):.1f};
Python {stored["python"]}, {versions}.

```bash
python benchmarks/caching.py MODEL DATA... --name {stored["model"]} --docs docs/results/caching.md
```
"""


def verdict(runs: list[dict[str, Any]]) -> str:
    """Whether the target was reached with all texts."""
    found = []
    for data in dict.fromkeys(run["data"] for run in runs):
        times = [[r["cpu_seconds"] for r in runs if (r["data"], r["way"]) == (data, way)] for way in reversed(WAYS)]
        found.append(statistics.median(times[0]) / statistics.median(times[1]))
    return "reached" if min(found) >= TARGET else f"missed, it is {min(found):.1f} times"


def spread(values: list[float], unit: str) -> str:
    """Median, and range where there are several."""
    middle = f"{statistics.median(values):.1f}{' ' if unit == 's' else ''}{unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
