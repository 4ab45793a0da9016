"""`ExitMonitor` on real exits: false alarms on undisturbed traffic, and rows until the alarm on other traffic.

    python benchmarks/drift.py --leave-out 30 train.jsonl pool.jsonl runs/TASK  # labels that training does not see
    badge-peft train MODEL runs/TASK/train.jsonl --eval-data runs/TASK/pool.jsonl --output-dir runs/TASK/adapter
    badge-peft evaluate runs/TASK/adapter runs/TASK/other.jsonl --unlabeled --save-logits runs/TASK/other.safetensors
    python benchmarks/drift.py --logits TASK=runs/TASK/adapter/exit_logits.safetensors ... \
        --other TASK:NAME=runs/TASK/other.safetensors ...
    python benchmarks/drift.py --docs docs/results/drift.md  # measures nothing: the page

From each pool, `--draws` times, rows are drawn on which `calibrate(max_score_drop=0.01)` chooses; the rest of the
pool, in random order, is the traffic. Disturbed traffic is undisturbed for some rows, and then a share of it is other
rows: those of `--other`, or the quarter of the pool of which full depth is least sure.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, calibrated, markdown, parser, pools_of, pools_option, read_lines, run

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits
from badge_peft.serving import ExitMonitor

SHARES = (0.1, 0.3, 1.0)
INTRODUCTION = """
An `ExitMonitor` with its defaults watches traffic that is drawn from the same pool as the calibration's rows, and
traffic into which other rows are mixed. It is given every row as a shadow row: at a sampled share of 5% an alarm after
100 rows comes after 2,000 requests. The adapters sit on a frozen all-MiniLM-L6-v2 (6 blocks, exits 0 to 6), trained as
[for the promises of calibrate](promises.md); the setting is that of
`calibrate(policy="divergence", max_score_drop=0.01)`. *120 of the intents* is CLINC150 trained without 30 of its 150
intents, drawn by `--leave-out 30`, whose texts then turn up.
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
    count = before + rows
    disturbed = torch.from_numpy(draw.random(count) < share)
    disturbed[:before] = False
    usual = torch.from_numpy(np.resize(draw.permutation(len(traffic)), count))
    odd = torch.from_numpy(draw.integers(len(other), size=count))
    seen = []
    for mine, theirs in zip(answers(traffic, config), answers(other, config), strict=True):
        rows_of = mine[usual].clone()
        rows_of[disturbed] = theirs[odd[disturbed]]
        seen.append(rows_of)
    monitor = ExitMonitor.for_adapter(config)
    alarm = monitor.observe(config, *seen)
    return (None, None) if alarm is None else (alarm.rows - before, alarm.kind)


def leave_out(count: int, train: str, pool: str, folder: Path, rows: int = 4500, other: int = 1000) -> None:
    """Writes `train.jsonl` and `pool.jsonl` without `count` labels, which are drawn, and `other.jsonl` with the pool's
    rows of these."""
    found = {"train": read_lines(train), "pool": read_lines(pool)}
    names = sorted({row["label"] for row in found["train"]})
    left = set(random.Random(0).sample(names, count))
    parts = {name: [row for row in own if row["label"] not in left] for name, own in found.items()}
    parts["pool"] = parts["pool"][:rows]
    parts["other"] = [row for row in found["pool"] if row["label"] in left][:other]
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


def measure(options: argparse.Namespace, results: Results) -> None:
    """The tasks that the file lacks."""
    others: dict[str, dict[str, ExitLogits]] = {}
    for other in options.other:
        place, _, file = other.partition("=")
        task, _, name = place.partition(":")
        others.setdefault(task, {})[name] = ExitLogits.load(file)
    for task, file in pools_of(options):
        if task not in results:
            results.keep(task, measure_task(ExitLogits.load(file), others.get(task, {}), options))


def measure_task(pool: ExitLogits, others: dict[str, ExitLogits], options: argparse.Namespace) -> dict[str, Any]:
    """By kind of traffic and share a list of draws, each with rows and kind of its alarm."""
    found: dict[str, Any] = {}
    size = options.calibration_rows
    for draw in range(options.draws):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(draw))
        config = calibrated(pool.select(order[:size]), "divergence", max_score_drop=0.01)
        traffic = pool.select(order[size:])
        quiet = min(options.rows, len(traffic))
        found.setdefault("undisturbed/0", []).append(
            rows_until_alarm(
                config,
                traffic,
                traffic,
                0.0,
                0,
                quiet,
                draw,
            )
        )
        for name, other in {"hardest quarter": hardest(traffic), **others}.items():
            for share in SHARES:
                alarm = rows_until_alarm(config, traffic, other, share, options.before, options.rows, draw)
                found.setdefault(f"{name}/{share}", []).append(alarm)
    return {"rows": quiet, "before": options.before, "calibration_rows": size, "alarms": found}


def page(results: Results) -> str:
    """Markdown."""
    quiet, disturbed = [], []
    for task, result in results.items():
        alarms = dict(result["alarms"])
        runs = [rows for rows, _ in alarms.pop("undisturbed/0")]
        quiet.append((task, len(runs), result["rows"], len(runs) - runs.count(None)))
        for key, found in alarms.items():
            name, _, share = key.rpartition("/")
            delays = [rows for rows, _ in found if rows is not None and rows > 0]
            kinds = [kind for _, kind in found]
            median, most = (f"{np.median(delays):.0f}", f"{max(delays)}") if delays else ("-", "-")
            tests = f"{kinds.count('agreement')} / {kinds.count('exits')}"
            disturbed.append([task, name, f"{float(share):.0%}", median, most, str(kinds.count(None)), tests])
    runs, alarms = (sum(line[i] for line in quiet) for i in (1, 3))
    first = next(iter(results.values()))
    heads = ["task", "other rows", "share", "median", "largest", "none", "agreement / exits"]
    return f"""# Drift: false alarms and delays

{alarms} false alarms in {runs} undisturbed runs, {len(quiet)} tasks.

{INTRODUCTION.strip()}

## Undisturbed traffic

{markdown(["task", "runs", "shadow rows each", "false alarms"], [list(map(str, line)) for line in quiet])}

Stated: at most one in 100,000 shadow rows in the mean.

## Other rows mixed in

Shadow rows from the start of the disturbance until the alarm: median and largest of the runs; how many runs had no
alarm at all; and which of the two tests raised it.

{markdown(heads, disturbed)}

Each run calibrates on {first["calibration_rows"]} rows of its own draw; {first["before"]} undisturbed rows come before
the disturbance, and up to {first["rows"]} rows after its start are watched. Made by

```bash
python benchmarks/drift.py --leave-out 30 train.jsonl pool.jsonl runs/TASK
badge-peft train MODEL runs/TASK/train.jsonl --eval-data runs/TASK/pool.jsonl --exit-layers 0-6 --carry none \\
    --policy divergence --output-dir runs/TASK/adapter
badge-peft evaluate runs/TASK/adapter runs/TASK/other.jsonl --unlabeled --save-logits FILE
python benchmarks/drift.py --logits TASK=runs/TASK/adapter/exit_logits.safetensors ... --other TASK:NAME=FILE ...
python benchmarks/drift.py --docs docs/results/drift.md
```
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, "runs/drift.json", threads=1)
    pools_option(options)
    options.add_argument(
        "--other",
        nargs="*",
        default=[],
        metavar="TASK:NAME=FILE",
        help="exit logits of other rows",
    )
    options.add_argument("--draws", type=int, default=20)
    options.add_argument("--calibration-rows", type=int, default=1500)
    options.add_argument("--before", type=int, default=500, help="undisturbed rows before the disturbance")
    options.add_argument("--rows", type=int, default=3000, help="shadow rows of each run")
    names = ("COUNT", "TRAIN", "POOL", "FOLDER")
    options.add_argument(
        "--leave-out", nargs=4, metavar=names, help="only write rows without COUNT labels, and the others"
    )
    given = options.parse_args(arguments)
    if given.leave_out:
        count, train, pool, folder = given.leave_out
        leave_out(int(count), train, pool, Path(folder))
        return 0
    return run(given, measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
