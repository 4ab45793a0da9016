"""How many replicas keep a latency: a simulation of 1 to 1,000, from times that were measured on one.

    python benchmarks/capacity.py measure ADAPTER texts.jsonl  # minutes: seconds of batches, on a machine at rest
    python benchmarks/capacity.py simulate                     # minutes of one core
    python benchmarks/capacity.py check runs/serve.json        # what benchmarks/serve.py measured, simulated
    python benchmarks/capacity.py page docs/scale.md           # the page and its pictures

Everything is kept in one file, `--json`. It needs the extras benchmarks, serve, and for pictures plots.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capacity_parts.check import check
from capacity_parts.fleet import simulate
from capacity_parts.measure import FULL, measure
from capacity_parts.page import page, pictures
from capacity_parts.plan import SIZES, Plan, cases, replicas_needed
from capacity_parts.service import Outcome, Service
from capacity_parts.traffic import bursts
from latency_parts import environment

from badge_peft.utils.files import write_json


def run(plan: Plan, seconds: float, sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """The tables, and the seconds of a burst."""
    ways, capacity = plan.ways(), plan.capacity()
    results: list[dict[str, Any]] = []
    guesses: dict[tuple[str, str], float] = {}
    for case in cases(seconds, sizes):
        peak, found = 0.7 * case.size * capacity, {}
        full: Outcome | None = None
        for name, service in ways.items():
            start = time.perf_counter()
            share = guesses.get((case.name, name), guesses.get(("a day", name), 1.0))
            guess = max(1, round(share * case.size))
            try:
                count, outcome = replicas_needed(service, case, peak, plan.target, guess, seed)
            except ValueError:
                found[name] = {"replicas": None, "drop": None, "p99": None}
                continue
            full = full or outcome
            guesses[case.name, name] = count / case.size
            found[name] = {"replicas": count, "drop": full.right - outcome.right, "p99": outcome.quantile(0.99)}
            took = time.perf_counter() - start
            print(f"{case.name}, {case.size}: {count} with {name} ({took:.0f} s)", flush=True)
        results.append({"case": case.name, "size": case.size, "peak_texts": peak * plan.request_rows, "ways": found})
    return {"results": results, "timeline": timeline(plan, ways, seconds, results, seed)}


def timeline(
    plan: Plan, ways: dict[str, Service], seconds: float, results: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Of bursts on the replicas that the last way takes: p99 and mean exit of each second, for full depth and that
    way."""
    size = min(10, max(result["size"] for result in results))
    result = next(result for result in results if result["case"] == "bursts" and result["size"] == size)
    last = list(ways)[-1]
    count, peak = result["ways"][last]["replicas"], result["peak_texts"] / plan.request_rows
    exits = plan.rows().exits.mean(axis=1)
    shown = {}
    for name in (FULL, last):
        outcome = simulate(ways[name], [1.0] * count, bursts(seconds), peak, seed)
        second = outcome.moments.astype(int)
        p99 = [_quantile(outcome.latencies[second == i]) for i in range(int(seconds))]
        steps = [(-1.0, ways[name].setting), *outcome.settings]
        mean = [float(exits[[n for at, n in steps if at <= i + 0.5][-1]]) for i in range(int(seconds))]
        shown[name] = {"p99": p99, "mean_exit": mean}
    return {"replicas": count, "peak_texts": result["peak_texts"], "ways": shown}


def _quantile(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.99)) if len(values) else 0.0


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", default="runs/capacity.json", help="the file of all results")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="seconds of batches")
    measuring.add_argument("adapter")
    measuring.add_argument("texts")
    measuring.add_argument("--repeats", type=int, default=20, help="batches of each size and setting")
    measuring.add_argument("--logits", help="exit logits; default: those in the adapter's folder")
    measuring.add_argument("--threads", type=int, default=1)
    simulating = commands.add_parser("simulate", help="replicas needed")
    simulating.add_argument("--target", type=float, default=0.1, help="seconds, for the 99th percentile")
    simulating.add_argument("--seconds", type=float, default=60, help="length of a day")
    simulating.add_argument("--request-rows", type=int, default=4, help="texts of a request")
    simulating.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="replicas that full depth takes")
    checking = commands.add_parser("check", help="against a load test")
    checking.add_argument("load_test", help="the JSON file of benchmarks/serve.py")
    checking.add_argument("--batch-size", type=int, default=32, help="texts, as it was given to the load test")
    checking.add_argument("--batch-wait", type=float, default=0.0, help="seconds, as well")
    writing = commands.add_parser("page", help="writes the page and its pictures")
    writing.add_argument("docs")
    for command in (measuring, simulating):
        command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    path = Path(options.json)
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if options.command == "measure":
        where = environment.describe(options.threads, "cpu")
        torch.set_num_threads(options.threads)
        sizes = (options.repeats, options.threads, options.seed)
        found = measure(options.adapter, options.texts, *sizes, options.logits)
        data = {"measured": {**found, "environment": where}}
    elif not data:
        raise FileNotFoundError(f"there is no file {path}: measure first.")
    elif options.command == "simulate":
        plan = Plan(data["measured"], options.target, options.request_rows)
        names = (FULL, "with exits")
        data["fits"] = {
            name: {**fit.to_dict(), "error": fit.error, "ratios": None}
            for name, fit in zip(names, plan.fits(), strict=True)
        }
        data |= {"target": options.target, "request_rows": options.request_rows, "seconds": options.seconds}
        data |= run(plan, options.seconds, tuple(options.sizes), options.seed)
    elif options.command == "check":
        load_test = json.loads(Path(options.load_test).read_text())
        data["check"] = check(data["measured"], load_test, options.batch_size, options.batch_wait)
    else:
        docs = Path(options.docs)
        docs.parent.mkdir(parents=True, exist_ok=True)
        docs.write_text(page(data), encoding="utf-8")
        pictures(data, docs.parent / "img")
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, data, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
