"""What early exits cost and save on the clock: PyTorch, ONNX Runtime and int8, against the same model without exits.

    python benchmarks/latency.py                                 # everything, about 25 minutes on 2 free cores
    python benchmarks/latency.py --only exits batch --sizes h384 --rounds 30
    python benchmarks/latency.py --docs docs/results/speed.md    # measures nothing: the page from the file

Results are saved as each shape ends, and a second run measures what is missing. `--sizes tiny` tries the benchmark.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import Results, describe, parser, run
from latency_parts.forced import SIZES, build
from latency_parts.memory import memory
from latency_parts.page import TITLES, page, tables
from latency_parts.runs import RUNS, Bench
from latency_parts.sessions import Sessions, has_onnx

# experiment -> rounds, and (rows, tokens) of what is measured at once
PLAN = {
    "full-depth": (30, ()),
    "exits": (14, ()),
    "batch": (8, ((8, 32), (32, 32), (8, 64), (32, 64))),
    "onnx": (20, ()),
    "onnx-int8": (20, ()),
    "onnx-batch": (10, ((8, 32), (32, 32))),
    "int8-vs-stock": (20, ()),
    "expected": (3, ()),
    "memory": (2, ((32, 128),)),
}
ON_CUDA = ("full-depth", "exits", "batch")  # the others are about the CPU


def measure(options: argparse.Namespace, results: Results) -> None:
    """What the file lacks; one model at a time is in memory."""
    experiments = [name for name in options.only if has_onnx() or not ("onnx" in name or "int8" in name)]
    if experiments != options.only:
        print("not measured, as it needs pip install 'badge-peft[onnx]':", *{*options.only} - {*experiments})
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.sizes:
            forced = build(SIZES[name], options.lengths)
            sessions = Sessions(forced, Path(options.cache or temporary) / name, options.threads)
            for device in options.devices:
                for model in (forced.stock, forced.model, forced.outside):
                    model.to(device)
                for experiment in experiments if device == "cpu" else [e for e in experiments if e in ON_CUDA]:
                    _measure(name, Bench(forced, sessions, device, 0), experiment, options, results)


def _measure(name: str, bench: Bench, experiment: str, options: argparse.Namespace, results: Results) -> None:
    """The shapes of one experiment, size and device that are missing."""
    usual, shapes = PLAN[experiment]
    rounds = options.rounds or usual
    where = describe(options.threads, bench.device)
    key = f"{experiment}/{name}/{bench.device}"
    section = results.get(key, {"environment": where, "seconds": 0.0, "rows": []})
    known = {(row["batch"], row["length"]) for row in section["rows"]}
    left = [shape for shape in shapes or [(1, length) for length in options.lengths] if shape not in known]
    for shape in left:
        start = time.perf_counter()
        if experiment == "memory":
            section["rows"] += memory(name, *shape, rounds, options.threads)
        else:
            one = Bench(bench.forced, bench.sessions, bench.device, rounds)
            section["rows"] += RUNS[experiment](one, *shape)
        section["seconds"] += time.perf_counter() - start
        results.keep(key, section)
    if left:
        print(TITLES[experiment], key, *tables(experiment, section["rows"]), sep="\n\n", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, "runs/latency.json")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    options.add_argument("--only", nargs="+", choices=PLAN, default=list(PLAN), help="these experiments")
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["BERT-base", "h384"])
    options.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), default=devices)
    options.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[16, 64, 128],
        help="tokens per row, batch 1",
    )
    options.add_argument("--rounds", type=int, help="of every experiment (default: its own)")
    options.add_argument(
        "--cache",
        metavar="FOLDER",
        help="keep exported ONNX files here; what is there is used",
    )
    return run(options.parse_args(arguments), measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
