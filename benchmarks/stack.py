"""A stack of real tasks on one frozen encoder: what the frozen backbone costs each, and what one pass saves.

    badge-peft train ENCODER DATA/TASK/train.jsonl --eval-data DATA/TASK/validation.jsonl \
        --backbone frozen --exit-layers 0-6 --carry none --output-dir ADAPTERS/TASK           # for each task
    python benchmarks/stack.py ENCODER DATA --adapters TASK=ADAPTERS/TASK ... --epochs 3 --bf16
    python benchmarks/stack.py ENCODER DATA --adapters TASK=ADAPTERS/TASK ... --time 200    # on a quiet machine
    python benchmarks/tasks.py --docs docs/results/tasks.md                      # the page

Each task's adapter is scored on its test rows, beside the same encoder trained for that task alone, all of it, with
one linear exit on the last block. A task may label tokens: its rows have `tokens` and `tags`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, describe, fit, markdown, parser
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, set_seed

from badge_peft import BadgeConfig, collect_exit_logits
from badge_peft.evaluation import exit_scores
from badge_peft.workflows.adapter_dir import early_exit_configs, open_adapter, open_tasks, parse_tasks
from badge_peft.workflows.bench import bench_tasks
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import evaluate_adapter
from badge_peft.workflows.fit import collator
from badge_peft.workflows.settings import Columns

RESULTS = "runs/tasks.json"


def measure(options: argparse.Namespace, results: Results) -> None:
    """What the file lacks of each task, and the times where they are asked for."""
    adapters = parse_tasks(options.adapters)
    for task, place in adapters.items():
        key = f"stack/{task}"
        section = results.get(key, {"environment": describe(options.threads)})
        if "frozen" not in section:
            results.keep(key, section := {**section, "frozen": score(place, Path(options.data, task))})
        if "full" not in section and options.epochs:
            found = fine_tune(place, Path(options.data, task), options)
            results.keep(key, section := {**section, "full": found})
        print(f"{task}: {section}", flush=True)
    if options.time:
        results.keep("stack-time", {"environment": describe(options.threads), **clock(adapters, options)})


def score(place: str, folder: Path) -> dict[str, Any]:
    """The scores of an adapter on the test rows, of each exit and of its own policy."""
    adapter = open_adapter(place)
    report, _ = evaluate_adapter(adapter, adapter.read(str(folder / "test.jsonl"), Columns()))
    kept = ("rows", "metric", "num_blocks", "exit_layers", "per_exit", "full_depth_score", "early_exit")
    return {name: report[name] for name in kept}


def fine_tune(place: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains all of the encoder for one task, with the adapter's labels and tokenizer; its score on the test rows."""
    start = time.perf_counter()
    set_seed(options.seed)
    adapter = open_adapter(place)
    rows = {name: adapter.encode(adapter.read(str(folder / f"{name}.jsonl"), Columns())) for name in ("train", "test")}
    labels = adapter.labels.names
    own = adapter.badge.config_of()
    kind = AutoModelForTokenClassification if own.reads_tokens else AutoModelForSequenceClassification
    form = {"placement": "none", "exit_layers": [adapter.badge.num_blocks], "exit_pooling": own.exit_pooling}
    config = BadgeConfig(task_type=own.task_type, backbone="full", final_exit="exit", **form)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    base = kind.from_pretrained(options.encoder, num_labels=len(labels), **names)  # tags are entities by their names
    model = get_peft_model(base, config)
    pad = collator(adapter.task == "tokens", adapter.tokenizer)
    steps = {"num_train_epochs": options.epochs, "per_device_train_batch_size": 32, "seed": options.seed}
    fit(model, rows["train"], pad, bf16=options.bf16, use_cpu=not torch.cuda.is_available(), **steps)
    metric = adapter.metric(None)
    found = exit_scores(collect_exit_logits(model, rows["test"]), metric)
    settings = {"train_rows": len(rows["train"]), "epochs": options.epochs, "bf16": options.bf16}
    return {"score": found.per_exit[-1], **settings, "seconds": time.perf_counter() - start}


def clock(adapters: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Times test texts of all tasks in turn, one by one: one pass, a call for each task, a full model for each."""
    stack = open_tasks(adapters)
    columns = Columns(unlabeled=True)
    each = [stack[task].read(Path(options.data, task, "test.jsonl"), columns).texts for task in adapters]
    texts = [text for several in zip(*each, strict=False) for text in several][: options.time]
    return bench_tasks(stack, TextDataset(texts), early_exit_configs(stack), len(texts), threads=options.threads)


def stack_section(results: Results) -> str:
    """Of the page of many tasks; nothing where no such stack was measured."""
    tasks = results.below("stack")
    full = {task: own["full"] for task, own in tasks.items() if "full" in own}
    if not full:
        return ""
    heads = ["", "test rows", "metric", "frozen: full depth", "frozen, with exits", "blocks saved", "own encoder"]
    lines = []
    for task, own in full.items():
        frozen = tasks[task]["frozen"]
        scores = [frozen["full_depth_score"], frozen["early_exit"]["score"], own["score"]]
        deep, early, alone = (f"{100 * value:.1f}" for value in scores)
        saved = f"{frozen['early_exit']['blocks_saved']:.0%}"
        cost = f"{100 * (scores[2] - scores[0]):.1f}"
        lines.append([task, f"{frozen['rows']:,}", frozen["metric"], deep, early, saved, alone, cost])
    rows = ", ".join(f"{task} {own['train_rows']:,}" for task, own in full.items())
    first = next(iter(full.values()))
    tokens = [task for task, own in tasks.items() if own["frozen"]["metric"] == "entity_f1"]
    of_tokens = (
        f" {', '.join(tokens)} labels tokens ([how it was trained](tokens.md)); its score is the F1 of entities."
    )
    return f"""
## A real stack

Adapters on one frozen all-MiniLM-L6-v2 (6 blocks, exits 0 to 6), each calibrated to lose at most one point, beside an
encoder of its own for each task, all of it trained on the same rows. The last column is what the frozen backbone costs
at full depth. Rows to train, to calibrate and to test on are parts of DATA, not the official splits.

{markdown([*heads, "frozen costs, points"], lines)}

The own encoders were trained for {first["epochs"]} epochs in {"bfloat16" if first["bf16"] else "float32"}, one seed,
on all rows ({rows}).{of_tokens if tokens else ""}
{_times(results)}
```bash
badge-peft train MINILM DATA/TASK/train.jsonl --eval-data DATA/TASK/validation.jsonl \\
    --backbone frozen --exit-layers 0-6 --carry none --output-dir ADAPTERS/TASK
python benchmarks/stack.py MINILM DATA --adapters {" ".join(f"{task}=ADAPTERS/{task}" for task in tasks)} ...
```
"""


def _times(results: Results) -> str:
    if (times := results.get("stack-time")) is None:
        return ""
    lines = [[way["name"], *(f"{way[key]:.1f}" for key in ("p50_ms", "p95_ms", "blocks"))] for way in times["results"]]
    return f"""
Time per text, {times["rows"]} test texts of all tasks in turn, one by one (PyTorch, float32, {times["threads"]}
threads, load {times["environment"]["load_1min"]} at the start):

{markdown(["", "median, ms", "95th percentile, ms", "blocks"], lines)}
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, RESULTS)
    options.add_argument("encoder", help="folder of the encoder")
    options.add_argument("data", help="folder with a folder for each task, of train.jsonl and test.jsonl")
    options.add_argument("--adapters", nargs="+", required=True, metavar="TASK=FOLDER", help="trained on the encoder")
    options.add_argument("--epochs", type=int, default=3, help="of the encoders that are trained; 0: none is")
    options.add_argument("--bf16", action="store_true", help="train these in bfloat16")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--time", type=int, default=0, metavar="TEXTS", help="also time the stack on as many texts")
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    measure(given, Results(given.json))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
