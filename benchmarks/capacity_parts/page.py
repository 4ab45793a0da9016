"""The page of the simulation, and its pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from badge_peft.serving.governor import REPORTS
from capacity_parts.measure import FULL

INTRODUCTION = """
How many replicas keep the 99th percentile of the latency below a target: at full depth, at the setting that the
adapter was calibrated for, and with a [controller](serving.md#a-target-and-a-floor) that becomes faster at noon. It is
a simulation of discrete events: times of batches are measured on one core, texts stop where the adapter's evaluation
rows do, a replica batches as the service does, requests go to the shorter queue of two replicas that are drawn, and
replicas report to the service's own governor, which moves the setting. All machines are like the one measured.
"""
MADE = """
Made by

```bash
pip install -e '.[benchmarks,plots,serve]'
python benchmarks/capacity.py measure ADAPTER texts.jsonl --repeats {repeats}
python benchmarks/capacity.py simulate --seconds {seconds:g} --sizes {sizes}
python benchmarks/capacity.py check runs/serve.json
python benchmarks/capacity.py page docs/scale.md
```
"""


def page(data: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["# Replicas for a target", "", headline(data), "", INTRODUCTION.strip(), ""]
    lines += ["## Replicas needed", "", *needed(data), ""]
    lines += [f"![replicas needed by the load](img/{name}.png)" for name in ("scale_replicas",)]
    lines += ["", "## A burst, second by second", "", *timeline(data), "", "![a burst](img/scale_burst.png)", ""]
    lines += ["## What it stands on", "", *ground(data), "", made(data), ""]
    return "\n".join(lines)


def made(data: dict[str, Any]) -> str:
    """The commands."""
    sizes = " ".join(map(str, dict.fromkeys(result["size"] for result in data["results"])))
    return MADE.strip().format(repeats=data["measured"]["repeats"], seconds=data["seconds"], sizes=sizes)


def headline(data: dict[str, Any]) -> str:
    """The largest day that was simulated."""
    result = max((r for r in data["results"] if r["case"] == "a day"), key=lambda r: r["size"])
    full, *others = result["ways"].items()
    parts = [
        f"{own['replicas']:,} with {name} ({1 - own['replicas'] / full[1]['replicas']:.0%} fewer, "
        f"{100 * own['drop']:.1f} points lost)"
        for name, own in others
    ]
    return (
        f"To keep p99 below {1000 * data['target']:.0f} ms, a day whose noon takes {full[1]['replicas']:,} replicas "
        f"at full depth takes {'; '.join(parts)}."
    )


def needed(data: dict[str, Any]) -> list[str]:
    """A row for each kind of traffic and size."""
    names = list(data["results"][0]["ways"])
    lines = [f"| traffic | texts per second at the peak | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for result in data["results"]:
        cells = []
        for own in result["ways"].values():
            cells.append("-" if own["replicas"] is None else f"{own['replicas']:,} ({100 * own['drop']:+.1f})")
        lines.append(f"| {result['case']} | {result['peak_texts']:,.0f} | {' | '.join(cells)} |")
    floors = "the points that the controllers may lose are those of the calibration's rows"
    return [
        *lines,
        "",
        f"In brackets the points of accuracy lost against full depth on the same kind of texts; {floors}. A harder "
        "day has three quarters of hard texts at its end (a quarter is usual): those of which full depth is least "
        "sure. - is a target that no number of replicas keeps. In the smallest fleets a day has so few texts that "
        "half a point is chance.",
        "",
        "A controller whose floor is the drop that the fixed setting was calibrated for cannot become faster than it: "
        "it takes as many replicas, and is more careful while there is time. One with a lower floor takes fewer. "
        "Where one machine in ten is slow, the router, which counts requests and not milliseconds, sends it its "
        "share: more than one request in a hundred, so that the 99th percentile is that of the slow machines. A fleet "
        f"of R replicas reports to the governor every R / {REPORTS} seconds, at most ten times a second, and hears of "
        "a new setting as late: bursts that begin at once and last seconds, as here, are half over before a fleet of "
        "hundreds has followed.",
    ]


def timeline(data: dict[str, Any]) -> list[str]:
    """What the second picture shows."""
    shown = data["timeline"]
    worst = {name: max(own["p99"]) for name, own in shown["ways"].items()}
    said = "; ".join(f"{name} {_milliseconds(value)}" for name, value in worst.items())
    return [
        f"{shown['replicas']} replicas, bursts of {shown['peak_texts']:,.0f} texts per second. The largest p99 of a "
        f"second: {said}. (The target is for all requests together; a line ends where requests are answered no more.)"
    ]


def _milliseconds(seconds: float) -> str:
    return "no answer" if math.isinf(seconds) else f"{1000 * seconds:,.0f} ms"


def ground(data: dict[str, Any]) -> list[str]:
    """The fit, the check, and what is assumed."""
    lines = []
    for name, fit in data["fits"].items():
        lines.append(
            f"* {name}: a pass takes {1000 * fit['call']:.2f} ms, and {1000 * fit['row']:.3f} ms for each text, "
            f"{1000 * fit['block']:.3f} ms for each block that runs and {1000 * fit['active']:.3f} ms for each block "
            f"of each text; measured batches lie {fit['error']:.0%} from it in the median, and the simulation draws "
            "from their quotients."
        )
    where = data["measured"]["environment"]
    clock = ", in seconds of the processor" if data["measured"]["threads"] == 1 else ""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines.append(
        f"* Measured on {where['cpu']}, {data['measured']['threads']} thread, Python {where['python']}, {versions}; "
        f"{len(data['measured']['batches']):,} batches of 1 to 32 texts{clock}, load of the machine "
        f"before it {where['load_1min']}; seed {data['measured']['seed']}. Target {1000 * data['target']:.0f} ms; the "
        f"controllers keep p95 below half of it; {data['request_rows']} texts per request; a day takes "
        f"{data['seconds']} s, of the largest fleets a third, which is far faster than any real one."
    )
    return lines + [*checked(data)]


def checked(data: dict[str, Any]) -> list[str]:
    """How far the simulation lies from the load test."""
    if not data.get("check"):
        return ["* It has not been checked against a load test yet."]
    lines = [
        "",
        "Against [the load test](results/serving.md), the same traffic simulated:",
        "",
        "| service | traffic | p50 measured / simulated | p95 | p99 |",
        "| --- | --- | --- | --- | --- |",
    ]
    errors = []
    for row in data["check"]["runs"]:
        cells = []
        for name in ("p50", "p95", "p99"):
            measured, simulated = row["measured"][name], row["simulated"][name]
            errors.append(abs(simulated / measured - 1))
            cells.append(f"{_milliseconds(measured)} / {_milliseconds(simulated)}")
        lines.append(f"| {row['way']} | {row['traffic']} | {' | '.join(cells)} |")
    finite = [error for error in errors if math.isfinite(error)]
    lines += [
        "",
        f"Median error {np.median(finite):.0%}, largest {max(finite):.0%}: where a queue grows all the time, it adds "
        "up what a small difference of speed makes. One number was taken from the load test: "
        f"its replica took {data['check']['slowness']:.2f} times as long as the engine alone, as it shares its "
        "machine with HTTP and the client, at full depth.",
    ]
    return lines


def pictures(data: dict[str, Any], folder: Path) -> None:
    """`scale_replicas.png` and `scale_burst.png`."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    days = [result for result in data["results"] if result["case"] == "a day"]
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, style in zip(days[0]["ways"], ("k--", "o-", "s-", "^-"), strict=False):
        axes.plot(
            [result["peak_texts"] for result in days],
            [result["ways"][name]["replicas"] for result in days],
            style,
            markersize=4,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="texts per second at noon", ylabel="replicas")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.legend(frameon=False)
    figure.savefig(folder / "scale_replicas.png", dpi=110)

    shown = data["timeline"]
    figure = Figure(figsize=(6.0, 4.4), layout="constrained")
    latency, exits = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for (name, own), style in zip(shown["ways"].items(), ("k--", "-", "-"), strict=False):
        shown_ms = [1000 * value if value else math.nan for value in own["p99"]]  # 0: none was answered
        latency.plot(shown_ms, style, label=name, linewidth=1.4)
        if name != FULL:
            exits.plot(own["mean_exit"], style, linewidth=1.4)
    latency.axhline(1000 * data["target"], color="#cc3311", linewidth=0.8)
    latency.set(yscale="log", ylabel="p99 of the second, ms")
    exits.set(xlabel="seconds", ylabel="mean exit")
    latency.legend(frameon=False)
    for axes in (latency, exits):
        axes.grid(color="#dddddd", linewidth=0.7)
    figure.savefig(folder / "scale_burst.png", dpi=110)


__all__ = ["FULL", "page", "pictures"]
