"""A decoder as a classifier with a frozen backbone: score per exit, and what leaves within one point save.

    python benchmarks/decoders.py MODEL banking77=DIR sst2=DIR --rows 4000 --bf16   # trains exits, scores them
    python benchmarks/decoders.py MODEL banking77=DIR sst2=DIR --time 100           # and then, on a quiet machine
    python benchmarks/decoders.py --docs docs/results/decoders.md                   # measures nothing: the page

MODEL is a folder of a causal language model with its tokenizer; a DIR has `train.jsonl`, `validation.jsonl` and
`test.jsonl`, with `text` and `label` on each line. No block runs in training: the states at the last token of each row
are computed once (with `--bf16` in bfloat16, as a CPU with AMX does it quickly), and all exits are trained on them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from datasets import Dataset
from latency_parts.environment import describe
from latency_parts.store import Store, read
from peft import PeftModel, get_peft_model
from task_parts.decoder_page import page
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from badge_peft import BadgeConfig, collect_exit_logits, load_pretrained
from badge_peft.evaluation import calibrate, evaluate_policy, exit_scores, measure_latency
from badge_peft.training import MultiExitTrainer, cache_states, multi_exit_arguments
from badge_peft.workflows.evaluate import recorded_fields

RESULTS = "runs/decoders.json"
SPLITS = ("train", "validation", "test")
DROP = 0.01


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.docs is not None:
        Path(options.docs).write_text(page(read(options.json)), encoding="utf-8")
        return 0
    torch.set_num_threads(options.threads)
    store = Store(options.json)
    for task in options.data:
        name, _, folder = task.partition("=")
        out = Path(options.adapters, name)
        if (out / "adapter_config.json").exists():
            print(f"{name}: {out} is there, and is not trained again", flush=True)
        else:
            store.add(f"scores/{name}", train(folder, out, options))
        if options.time:
            store.add(f"time/{name}", clock(folder, out, options))
    return 0


def train(folder: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains exits, chooses how to stop on the validation rows, saves the adapter; returns the scores on test rows."""
    start = time.perf_counter()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="right")
    rows, labels = rows_of(folder, tokenizer, options)
    base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels))
    base.config.pad_token_id = tokenizer.pad_token_id
    config = BadgeConfig(task_type="SEQ_CLS", final_exit="exit", carry=options.carry, label_names=labels)
    model = get_peft_model(base, config).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
        states = {name: cache_states(model, rows[name], dtype="float32", progress=True) for name in SPLITS}
    cached = time.perf_counter() - start
    fit(model, rows["train"], tokenizer, states["train"], options)
    found = {name: collect_exit_logits(model, rows[name], cached_states=states[name]) for name in SPLITS[1:]}
    chosen = calibrate(found["validation"], options.policy, max_score_drop=DROP)
    model.set_early_exit_config(chosen)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    scores, point = exit_scores(found["test"]), evaluate_policy(found["test"], chosen)
    result = {
        "rows": {name: len(rows[name]) for name in SPLITS},
        "num_blocks": found["test"].depth,
        "exit_layers": scores.exit_layers,
        "per_exit": scores.per_exit,
        "avg": scores.avg,
        "best": scores.best,
        "policy": recorded_fields(chosen),
        "score": point.score,
        "layer_speedup": point.layer_speedup,
        "settings": {
            k: v for k, v in vars(options).items() if k in ("epochs", "lr", "carry", "bf16", "seed", "length")
        },
        "states": {"seconds": cached, "bytes": sum(kept.nbytes for kept in states.values())},
        "seconds": time.perf_counter() - start,
        "environment": describe(options.threads, "cpu"),
    }
    print(f"{out.name}: best {scores.best:.4f}, {point.score:.4f} at {point.layer_speedup:.1%} saved", flush=True)
    return result


def fit(model: PeftModel, rows: Dataset, tokenizer: Any, states: Any, options: argparse.Namespace) -> None:
    """Trains all exits on cached states."""
    with TemporaryDirectory() as folder:
        arguments = multi_exit_arguments(
            model,
            folder,
            adapter_learning_rate=options.lr,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            seed=options.seed,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            label_names=["labels"],
            report_to="none",
        )
        collator = DataCollatorWithPadding(tokenizer)
        MultiExitTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, cache_states=states
        ).train()
    model.eval()


def clock(folder: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times the first test texts one by one, in float32, with early exits and at full depth without exits."""
    model = load_pretrained(str(out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = rows_of(folder, tokenizer, options)[0]["test"].select(range(options.time))
    found = measure_latency(model, rows, warmup=5)
    labels = np.asarray(rows["labels"])
    return {
        "rows": len(found),
        "full_ms": found.full_depth_mean_ms,
        "mean_ms": found.mean_ms,
        "time_saved": found.speedup_paper,
        "layer_speedup": found.layer_speedup,
        "score": float((labels == np.asarray(found.predictions)).mean()),
        "environment": describe(options.threads, "cpu"),
    }


def rows_of(folder: str, tokenizer: Any, options: argparse.Namespace) -> tuple[dict[str, Dataset], list[str]]:
    """Tokenized rows of each split, at most as many as asked for, in a fixed random order; and the labels' names."""
    lines = {
        name: [json.loads(line) for line in Path(folder, f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in SPLITS
    }
    labels = sorted({str(row["label"]) for row in lines["train"]})
    rows = {}
    for name, found in lines.items():
        order = np.random.default_rng(0).permutation(len(found))[: options.rows if name == "train" else options.others]
        chosen = [found[i] for i in order]
        encoded = tokenizer([row["text"] for row in chosen], truncation=True, max_length=options.length)
        numbers = [labels.index(str(row["label"])) for row in chosen]
        columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        rows[name] = Dataset.from_dict({**columns, "labels": numbers})
    return rows, labels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", help="folder of a causal language model")
    parser.add_argument("data", nargs="*", metavar="TASK=DIR", help="tasks, with the folders of their rows")
    parser.add_argument("--adapters", default="runs/decoders", help="where the adapters are; what is there is used")
    parser.add_argument("--rows", type=int, default=4000, help="of training, at most")
    parser.add_argument("--others", type=int, default=1000, help="of validation, and of test, at most")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row, at most")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--carry", choices=("logits", "states"), default="logits", help="of `BadgeConfig`")
    parser.add_argument("--policy", default="auto", help="as `calibrate` takes it")
    parser.add_argument("--bf16", action="store_true", help="compute the states in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", type=int, default=0, metavar="TEXTS", help="also time as many test texts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=RESULTS, help=f"the file of the results (default: {RESULTS})")
    parser.add_argument("--docs", metavar="FILE", help="measure nothing: write the page")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
