"""What cached states save: `badge-peft train` with a frozen backbone, with them and without, in turn.

    python benchmarks/caching.py MODEL DATA.jsonl ...
    python benchmarks/caching.py --docs docs/results/caching.md    # measures nothing: the page from the file

Each training is a process of its own, the whole command from the import to the report.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import Results, describe, markdown, parser, run, verdict, versions

TIMES = {
    "cpu_seconds": "whole command, processor",
    "seconds": "whole command, clock",
    "training_seconds": "training alone, clock",
}
TARGET = 4.0
WAYS = {"cached": [], "uncached": ["--no-cache-states"]}


def measure(options: argparse.Namespace, results: Results) -> None:
    """The trainings that the file lacks."""
    about = {"model": options.name or Path(options.model).name, "epochs": options.epochs}
    results.keep("about", {**about, "environment": describe(options.threads)})
    for repeat in range(options.repeats):
        for data in options.data:
            for way, arguments in WAYS.items():
                if (key := f"{data.parent.name}/{way}/{repeat}") not in results:
                    results.keep(key, train(options, data, arguments))
                    print(key, results[key], flush=True)


def train(options: argparse.Namespace, data: Path, arguments: list[str]) -> dict[str, Any]:
    """One command: its seconds, those of the training alone, and its scores."""
    command = [sys.executable, "-m", "badge_peft.cli", "train", options.model, str(data)]
    command += ["--max-rows", str(options.rows), "--epochs", str(options.epochs), "--latency", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        cpu = cpu_seconds()
        load = os.getloadavg()[0]
        subprocess.run(
            [*command, "--output-dir", folder, *arguments],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        cpu = cpu_seconds() - cpu
        report = json.loads((Path(folder) / "report.json").read_text())
    scores = {name: report[name] for name in ("s_avg", "s_best", "training_seconds", "states", "train_rows")}
    return {"seconds": seconds, "cpu_seconds": cpu, "load": load, **scores}


def cpu_seconds() -> float:
    """What the commands so far took of the processor, whatever else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def page(results: Results) -> str:
    """Markdown."""
    about = results["about"]
    runs = {key: own for key, own in results.items() if key != "about"}
    where = about["environment"]
    lines = []
    gains = []
    for data in dict.fromkeys(key.split("/")[0] for key in runs):
        cached, uncached = ([*results.below(f"{data}/{way}").values()] for way in WAYS)
        for name, what in TIMES.items():
            a, b = ([run[name] for run in own] for own in (cached, uncached))
            ratios = [slow / fast for fast, slow in zip(a, b, strict=False)]
            lines.append([data, what, spread(b, " s"), spread(a, " s"), spread(ratios, "x")])
        gains.append(
            statistics.median(r["cpu_seconds"] for r in uncached) / statistics.median(r["cpu_seconds"] for r in cached)
        )
        scores = [spread([100 * run["s_avg"] for run in own], "") for own in (uncached, cached)]
        lines.append(
            [data, "S-avg; states", scores[0], f"{scores[1]}; {cached[0]['states']['bytes'] / 1e9:.2f} GB", ""]
        )
    repeats = max(int(key.split("/")[2]) for key in runs) + 1
    loads = [run["load"] for run in runs.values()]
    rows = next(iter(runs.values()))["train_rows"]
    return f"""# Cached states

What they save when exits are trained on a frozen backbone ([Training](../training.md#cached-states)):
`badge-peft train {about["model"]} DATA --epochs {about["epochs"]}`, {rows:,} texts to train on, with and without
`--no-cache-states`, taking turns, each in a process of its own. Medians of {repeats} runs, and their range.

{markdown(["texts", "", "uncached", "cached", "times faster"], lines)}

The target was a whole command {TARGET:.0f} times faster, by the processor's time: {verdict(min(gains) >= TARGET)},
it is {min(gains):.1f} times.

The whole command also reads and encodes the texts, runs the evaluation rows once, and calibrates. The scores differ
as cached training has no dropout in the backbone.

{where["threads"]} thread(s) of a CPU, load of the machine before a run {min(loads):.1f} to {max(loads):.1f};
{versions(where)}.

```bash
python benchmarks/caching.py MODEL DATA... --name {about["model"]}
python benchmarks/caching.py --docs docs/results/caching.md
```
"""


def spread(values: list[float], unit: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):.1f}{unit} ({min(values):.1f}-{max(values):.1f})"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, "runs/caching.json", threads=1)
    options.add_argument("model", nargs="?", help="folder of an encoder or classifier")
    options.add_argument("data", type=Path, nargs="*", help="files of labeled texts")
    options.add_argument("--name", help="of the model, on the page")
    options.add_argument("--rows", type=int, default=10_000, help="of each file; a fifth is for evaluation")
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--repeats", type=int, default=3)
    return run(options.parse_args(arguments), measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
