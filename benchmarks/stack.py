"""A stack of real tasks on one frozen encoder: what the frozen backbone costs each, and what one pass saves.

    badge-peft train ENCODER DATA/TASK/train.jsonl --eval-data DATA/TASK/validation.jsonl \
        --backbone frozen --exit-layers 0-6 --carry none --output-dir ADAPTERS/TASK           # for each task
    python benchmarks/stack.py ENCODER DATA --adapters TASK=ADAPTERS/TASK ... --epochs 3 --bf16
    python benchmarks/stack.py ENCODER DATA --adapters TASK=ADAPTERS/TASK ... --time 200    # on a quiet machine
    python benchmarks/tasks.py --docs docs/results/tasks.md                      # the page

Each task's adapter is scored on its test rows, beside the same encoder trained for that task alone, all of it, with
one linear exit on the last block. A task may label tokens: its rows have `tokens` and `tags`. What is in the file of
the results is not measured again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from latency_parts.environment import describe
from latency_parts.store import Store
from peft import get_peft_model
from task_parts.stack_page import SECTION, TIMES
from tasks import RESULTS
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, set_seed

from badge_peft import BadgeConfig, collect_exit_logits
from badge_peft.evaluation import exit_scores
from badge_peft.training import MultiExitTrainer, multi_exit_arguments
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.bench_tasks import bench_tasks
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import evaluate_adapter, resolve_metric
from badge_peft.workflows.fit import collator
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.tasks import open_tasks, parse_tasks


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    store = Store(options.json)
    adapters = parse_tasks(options.adapters)
    for task, place in adapters.items():
        key = f"{SECTION}/{task}"
        section = store.sections.get(key, {"environment": describe(options.threads, "cpu")})
        if "frozen" not in section:
            store.add(key, section := {**section, "frozen": score(place, Path(options.data, task))})
        if "full" not in section and options.epochs:
            found = fine_tune(place, Path(options.data, task), options)
            store.add(key, section := {**section, "full": found})
        print(f"{task}: {section}", flush=True)
    if options.time:
        store.add(TIMES, {"environment": describe(options.threads, "cpu"), **clock(adapters, options)})
    return 0


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
    labels, own = adapter.labels.names, adapter.badge.config_of()
    kind = AutoModelForTokenClassification if own.reads_tokens else AutoModelForSequenceClassification
    config = BadgeConfig(
        task_type=own.task_type,
        backbone="full",
        placement="none",
        exit_layers=[adapter.badge.num_blocks],
        final_exit="exit",
        exit_pooling=own.exit_pooling,
    )
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    base = kind.from_pretrained(options.encoder, num_labels=len(labels), **names)  # tags are entities by their names
    model = get_peft_model(base, config)
    with TemporaryDirectory() as output:
        arguments = multi_exit_arguments(
            model,
            output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=options.seed,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            label_names=["labels"],
            report_to="none",
        )
        pad = collator(adapter.task == "tokens", adapter.tokenizer)
        MultiExitTrainer(model=model, args=arguments, train_dataset=rows["train"], data_collator=pad).train()
    metric = resolve_metric(None, adapter.labels.problem_type, len(labels), adapter.tags)
    found = exit_scores(collect_exit_logits(model.eval(), rows["test"]), metric)
    return {
        "score": found.per_exit[-1],
        "train_rows": len(rows["train"]),
        "epochs": options.epochs,
        "bf16": options.bf16,
        "seconds": time.perf_counter() - start,
    }


def clock(adapters: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Times test texts of all tasks in turn, one by one: one pass, a call for each task, a full model for each."""
    stack = open_tasks(adapters)
    columns = Columns(unlabeled=True)
    each = [stack.adapters[task].read(Path(options.data, task, "test.jsonl"), columns).texts for task in adapters]
    texts = [text for several in zip(*each, strict=False) for text in several][: options.time]
    return bench_tasks(stack, TextDataset(texts), stack.early_exit_configs(), len(texts), threads=options.threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("encoder", help="folder of the encoder")
    parser.add_argument("data", help="folder with a folder for each task, of train.jsonl and test.jsonl")
    parser.add_argument("--adapters", nargs="+", required=True, metavar="TASK=FOLDER", help="trained on the encoder")
    parser.add_argument("--epochs", type=int, default=3, help="of the encoders that are trained; 0: none is")
    parser.add_argument("--bf16", action="store_true", help="train these in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", type=int, default=0, metavar="TEXTS", help="also time the stack on as many texts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=RESULTS, help=f"the file of the results (default: {RESULTS})")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
