"""docs/results/serving.md and its pictures, from the stored results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, markdown

from serve_parts.overhead import section

COLORS = {"stock": "#555555", "fixed": "#0072B2", "controller": "#D55E00"}
NAMES = {
    "stock": "stock: full depth",
    "fixed": "BADGE, its own setting",
    "controller": "BADGE, controller",
}
SHAPES = {
    "bursts": "*bursts* 0.5 and, twice, 2.0",
    "day": "*day* a wave from 0.2 to 1.6",
}
PRICE = 0.1  # dollars that a machine costs in an hour
# a request as it is stored
AT, LAG, SECONDS, STATUS, TEXTS, RIGHT, FULL_RIGHT, BLOCKS = range(8)


def summary(requests: Sequence[Sequence[float]], target: float) -> dict[str, float]:
    """Of some requests: quantiles of the latency, the share within the target, scores, errors."""
    rows = np.array(requests, dtype=float)
    good = rows[rows[:, STATUS] == 200]
    middle, high, highest = np.quantile(good[:, SECONDS], (0.5, 0.95, 0.99)) if len(good) else (np.nan,) * 3
    texts = good[:, TEXTS].sum() or np.nan
    return {
        "requests": len(rows),
        "p50": middle,
        "p95": high,
        "p99": highest,
        "within": float((good[:, SECONDS] <= target).sum() / len(rows)),
        "score": good[:, RIGHT].sum() / texts,
        "full": good[:, FULL_RIGHT].sum() / texts,
        "blocks": good[:, BLOCKS].sum() / texts,
        "errors": len(rows) - len(good),
        "lag": float(np.quantile(rows[:, LAG], 0.99)),
    }


def load_table(runs: dict[str, Any], target: float) -> str:
    """One line for each traffic and way."""
    head = ["traffic", "served", "requests", "p50, ms", "p95, ms", "p99, ms", "within target", "errors"]
    head += ["mean exit", "score", "full depth's"]
    lines = []
    for traffic, ways in runs.items():
        for way, requests in ways.items():
            s = summary(requests, target)
            times = [f"{1e3 * s[name]:.0f}" for name in ("p50", "p95", "p99")]
            lines.append(
                [traffic, NAMES[way], f"{s['requests']:.0f}", *times, f"{s['within']:.1%}", f"{s['errors']:.0f}"]
                + [f"{s['blocks']:.2f}", f"{s['score']:.4f}", f"{s['full']:.4f}"]
            )
    return markdown(head, lines)


def picture(ways: dict[str, Any], target: float, title: str, path: Path) -> None:
    """What is sent, the p95 latency and the mean exit, second by second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    top, middle, low = figure.subplots(3, 1, sharex=True, height_ratios=[1, 2, 1])
    for way, requests in ways.items():
        rows = np.array(requests, dtype=float)
        seconds = np.arange(int(rows[:, AT].max()) + 1)
        parts = [rows[(rows[:, AT] >= s) & (rows[:, AT] < s + 1)] for s in seconds]
        if way == "stock":
            top.plot(seconds, [part[:, TEXTS].sum() for part in parts], color="black", linewidth=1)
        good = [part[part[:, STATUS] == 200] for part in parts]
        late = [np.quantile(part[:, SECONDS], 0.95) if len(part) else np.nan for part in good]
        depth = [part[:, BLOCKS].sum() / part[:, TEXTS].sum() if len(part) else np.nan for part in good]
        for axis, values in ((middle, late), (low, depth)):
            axis.plot(seconds, values, color=COLORS[way], label=NAMES[way], linewidth=1.4)
    middle.axhline(target, color="black", linestyle=":", linewidth=1)
    middle.set(yscale="log", ylabel="p95, s")
    middle.legend(fontsize=8)
    top.set(ylabel="texts/s", title=title)
    low.set(ylabel="mean exit", xlabel="seconds")
    for axis in (top, middle, low):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def page(data: dict[str, Any], busy: Callable[[float], bool], pictures: dict[str, str]) -> str:
    """Markdown, headline first; `busy` says which seconds are of a burst."""
    load, capacity = data["load"], data["capacity"]
    target = load["target"]
    where = load["environment"]
    drop = load["max_score_drop"]
    busiest = {way: [r for r in requests if busy(r[AT])] for way, requests in data["runs"]["bursts"].items()}
    bursts = {way: summary(requests, target) for way, requests in busiest.items()}
    whole = {way: summary(requests, target) for way, requests in data["runs"]["bursts"].items()}
    held = bursts["controller"]
    verdict = "holds" if held["p95"] <= target else "misses"
    gain, fixed_gain = (100 * (whole[way]["score"] - whole[way]["full"]) for way in ("controller", "fixed"))
    lines = [
        "# The service under load",
        "",
        f"In bursts of twice what the stock model can answer, the controller {verdict} its target, a p95 of "
        f"{1e3 * target:.0f} ms: {1e3 * held['p95']:.0f} ms, {held['within']:.1%} of the requests within it. The "
        f"stock model's queue grows as long as a burst lasts, to a p95 of {bursts['stock']['p95']:.1f} s, with "
        f"{bursts['stock']['errors']:.0f} of {bursts['stock']['requests']:.0f} requests refused. Over the whole run "
        f"the controller scores {gain:+.1f} points against full depth on the same texts "
        f"({whole['controller']['score']:.4f}, {whole['controller']['full']:.4f}).",
        "",
        f"The adapter's own setting, which was calibrated to lose at most {100 * drop:.0f} point, "
        f"stays at {1e3 * bursts['fixed']['p95']:.0f} ms in the same bursts, at {fixed_gain:+.1f} points: where it is "
        "fast enough all day, nothing has to move.",
        "",
        f"![Bursts of twice the stock model's capacity]({pictures['bursts']})",
        "",
        "## Traffic",
        "",
        f"Requests of {load['size']} texts, sent at times that do not wait for answers; latency counts from the time "
        "at which a request was to be sent. Rates are shares of what the stock model answers at most: "
        f"{'; '.join(SHAPES[name] for name in data['runs'])}.",
        "",
        load_table(data["runs"], target),
        "",
        "Within the bursts alone:",
        "",
        load_table({"bursts": busiest}, target),
        "",
        f"![A day]({pictures['day']})",
        "",
        "## What a machine answers, and what it costs",
        "",
    ]
    head = ["served", "texts per second", "replica's CPU, ms per text", f"per 1,000 texts at ${PRICE}/h"]
    body = []
    names = {**NAMES, "controller": "BADGE, the fastest point above the controller's floor"}
    for way, own in capacity.items():
        cost = 1000 / own["texts_per_second"] / 3600 * PRICE
        body.append([names[way], f"{own['texts_per_second']:.0f}", f"{own['cpu_ms']:.2f}", f"${cost:.6f}"])
    lines += [markdown(head, body), ""]
    if "overhead" in data:
        lines += ["## What the service takes by itself", "", *section(data["overhead"]), ""]
    if "kills" in data:
        k = data["kills"]
        errors = ", ".join(f"{number} with {status}" for status, number in k["errors"].items()) or "none"
        lines += [
            "## Replicas killed under load",
            "",
            f"{k['kills']} times one of {k['replicas']} replicas was killed (SIGKILL) with requests in it. Of "
            f"{k['requests']} requests {k['answered']} were answered, {k['wrong']} of them with something that "
            "is not the answer to its texts (label, exit and score were compared); the others ended with an error "
            f"that their client saw ({errors}). None was lost without one.",
            "",
        ]
    lags = [summary(r, target)["lag"] for ways in data["runs"].values() for r in ways.values()]
    lines += [
        "## How it was measured",
        "",
        f"{where['date']}, load {where['load_1min']} at the start: {machine(where)}. The replica, Ray's proxy and the "
        "client share the cores. "
        f"The client sent 99% of the requests within {1e3 * max(lags):.0f} ms of their time. Adapter: "
        f'{load["adapter"]}. *Stock* is the same service with `policy="never"`: full depth, where no exit is computed '
        f"but the last. The controller's floor is {drop} below full depth on the rows of the "
        "calibration, which are not the texts sent.",
        "",
        "```bash",
        f"python benchmarks/serve.py ADAPTER TEXTS.jsonl --scale {load['scale']:g}",
        "python benchmarks/serve.py ADAPTER TEXTS.jsonl --overhead",
        "python benchmarks/serve.py ADAPTER TEXTS.jsonl --kills 20 --pause 1.0",
        "python benchmarks/serve.py --docs docs/results/serving.md",
        "```",
        "",
    ]
    return "\n".join(lines)
