"""`ExitMonitor` on real exits: false alarms on undisturbed traffic, and rows until the alarm on other traffic.

    badge-peft train MODEL train.jsonl --eval-data pool.jsonl --output-dir runs/TASK  # writes exit_logits.safetensors
    badge-peft evaluate runs/TASK/adapter other.jsonl --save-logits runs/other.safetensors
    python benchmarks/drift.py --logits TASK=runs/TASK/exit_logits.safetensors ... \
        --other TASK:NAME=runs/other.safetensors
    python benchmarks/drift.py --docs docs/results/drift.md  # measures nothing: the page

From each pool, `--draws` times, rows are drawn on which `calibrate(max_score_drop=0.01)` chooses; the rest of the
pool, in random order, is the traffic. Disturbed traffic is undisturbed for some rows, and then a share of it is other
rows: those of `--other`, or the quarter of the pool of which full depth is least sure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits, calibrate
from badge_peft.serving import ExitMonitor

SHARES = (0.1, 0.3, 1.0)
INTRODUCTION = """
An `ExitMonitor` with its defaults watches traffic that is drawn from the same pool as the calibration's rows, and
traffic into which other rows are mixed. It is given every row as a shadow row: at a sampled share of 5% an alarm after
100 rows comes after 2,000 requests. The adapters sit on a frozen all-MiniLM-L6-v2 (6 blocks, exits 0 to 6), trained as
[for the promises of calibrate](promises.md); the setting is that of
`calibrate(policy="divergence", max_score_drop=0.01)`.
"""


def answers(exit_logits: ExitLogits, config: EarlyExitConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `observe` is given of all rows: exits [N], early logits [N, K], full depth's logits [N, K]."""
    stops = torch.from_numpy(build_policy(config).replay_history(exit_logits.history()))
    return stops, exit_logits.answers(stops), exit_logits.logits[:, -1]


def hardest(exit_logits: ExitLogits) -> ExitLogits:
    """The quarter of the rows of which full depth is least sure."""
    sure = exit_logits.logits[:, -1].softmax(-1).amax(-1)
    return exit_logits.select(sure.argsort()[: max(len(exit_logits) // 4, 1)])


def rows_until_alarm(
    config: EarlyExitConfig, traffic: ExitLogits, other: ExitLogits, share: float, before: int, rows: int, seed: int
) -> tuple[int | None, str | None]:
    """Rows of the disturbed traffic until the alarm, and its kind; None where there was none in `rows`. A negative
    number is an alarm before the disturbance."""
    draw = np.random.default_rng(seed)
    usual, odd = answers(traffic, config), answers(other, config)
    monitor = ExitMonitor.for_adapter(config)
    place = draw.permutation(len(traffic))
    disturbed = draw.random(before + rows) < share
    disturbed[:before] = False
    for i in range(before + rows):
        part, row = (odd, draw.integers(len(other))) if disturbed[i] else (usual, place[i % len(place)])
        if monitor.observe(config, *(x[row : row + 1] for x in part)):
            assert monitor.alarm is not None
            return i + 1 - before, monitor.alarm.kind
    return None, None


def measure(pool: ExitLogits, others: dict[str, ExitLogits], options: argparse.Namespace) -> dict[str, Any]:
    """By kind of traffic and share a list of draws, each with rows and kind of its alarm."""
    found: dict[str, Any] = {}
    for draw in range(options.draws):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(draw))
        size = options.calibration_rows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = calibrate(pool.select(order[:size]), "divergence", max_score_drop=0.01)
        traffic = pool.select(order[size:])
        quiet = min(options.rows, len(traffic))
        found.setdefault("undisturbed/0", []).append(rows_until_alarm(config, traffic, traffic, 0.0, 0, quiet, draw))
        for name, other in {"hardest quarter": hardest(traffic), **others}.items():
            for share in SHARES:
                alarm = rows_until_alarm(config, traffic, other, share, options.before, options.rows, draw)
                found.setdefault(f"{name}/{share}", []).append(alarm)
    return {"rows": quiet, "before": options.before, "calibration_rows": size, "alarms": found}


def page(data: dict[str, Any]) -> str:
    """The tables in Markdown."""
    lines = ["# Drift: false alarms and delays", "", INTRODUCTION.strip(), ""]
    lines += [
        "## Undisturbed traffic",
        "",
        "| task | runs | shadow rows each | false alarms |",
        "| --- | --- | --- | --- |",
    ]
    for task, result in data.items():
        runs = result["alarms"]["undisturbed/0"]
        lines.append(f"| {task} | {len(runs)} | {result['rows']} | {sum(rows is not None for rows, _ in runs)} |")
    lines += [
        "",
        "Stated: at most one in 100,000 shadow rows in the mean.",
        "",
        "## Other rows mixed in",
        "",
        "Shadow rows from the start of the disturbance until the alarm: median and largest of the runs; how many "
        "runs had no alarm at all; and which of the two tests raised it.",
        "",
        "| task | other rows | share | median | largest | none | agreement / exits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, result in data.items():
        for key, runs in result["alarms"].items():
            name, _, share = key.rpartition("/")
            if name == "undisturbed":
                continue
            delays = [rows for rows, _ in runs if rows is not None and rows > 0]
            kinds = [kind for _, kind in runs]
            median, most = (f"{np.median(delays):.0f}", f"{max(delays)}") if delays else ("-", "-")
            lines.append(
                f"| {task} | {name} | {float(share):.0%} | {median} | {most} | {kinds.count(None)} "
                f"| {kinds.count('agreement')} / {kinds.count('exits')} |"
            )
    first = next(iter(data.values()))
    lines += [
        "",
        f"Each run calibrates on {first['calibration_rows']} rows of its own draw; {first['before']} undisturbed rows "
        f"come before the disturbance, and up to {first['rows']} rows after its start are watched. Made by",
        "",
        "```bash",
        "python benchmarks/drift.py --logits TASK=runs/TASK/exit_logits.safetensors ... --other TASK:NAME=FILE ...",
        "python benchmarks/drift.py --docs docs/results/drift.md",
        "```",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--logits", nargs="*", default=[], metavar="TASK=FILE", help="pools of labeled exit logits")
    parser.add_argument("--other", nargs="*", default=[], metavar="TASK:NAME=FILE", help="exit logits of other rows")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--calibration-rows", type=int, default=1500)
    parser.add_argument("--before", type=int, default=500, help="undisturbed rows before the disturbance")
    parser.add_argument("--rows", type=int, default=3000, help="shadow rows of each run")
    parser.add_argument("--json", default="runs/drift.json", help="the file of the results")
    parser.add_argument("--docs", metavar="FILE", help="measure nothing: write the page from the file")
    options = parser.parse_args(arguments)
    path = Path(options.json)
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if options.docs:
        Path(options.docs).write_text(page(data), encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    for item in options.logits:
        task, _, file = item.partition("=")
        start, others = time.perf_counter(), {}
        for other in options.other:
            owner, _, rest = other.partition(":")
            name, _, place = rest.partition("=")
            if owner == task:
                others[name] = ExitLogits.load(place)
        data[task] = measure(ExitLogits.load(file), others, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        print(f"{task}: {time.perf_counter() - start:.0f} s", flush=True)
    print(page(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
