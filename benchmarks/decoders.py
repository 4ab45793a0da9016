"""A decoder as a classifier with a frozen backbone: score per exit, and what leaves within one point save.

    python benchmarks/decoders.py MODEL banking77=DIR sst2=DIR --rows 4000 --bf16   # trains exits, scores them
    python benchmarks/decoders.py MODEL sst2-asked=DIR --suffix " Sentiment:" ...   # the same, behind each text
    python benchmarks/decoders.py MODEL banking77=DIR sst2=DIR --time 100           # and then, on a quiet machine
    python benchmarks/decoders.py --docs docs/results/decoders.md                   # measures nothing: the page

MODEL is a folder of a causal language model with its tokenizer; a DIR has `train.jsonl`, `validation.jsonl` and
`test.jsonl`, with `text` and `label` on each line. No block runs in training: the states at the last token of each row
are computed once (with `--bf16` in bfloat16, as a CPU with AMX does it quickly), and all exits are trained on them,
in each of the `FORMS`. The last form is what is saved, and what the page is about.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
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

from badge_peft import BadgeConfig, ExitLogits, collect_exit_logits, load_pretrained
from badge_peft.evaluation import calibrate, evaluate_policy, exit_scores, measure_latency
from badge_peft.training import MultiExitTrainer, cache_states, multi_exit_arguments
from badge_peft.workflows.evaluate import recorded_fields

RESULTS = "runs/decoders.json"
SPLITS = ("train", "validation", "test")
DROP = 0.01
GOALS = (0.25, 0.5, 0.66, 0.75)
#: Fields of `BadgeConfig`.
FORMS: dict[str, dict[str, Any]] = {
    "no bypass": {"placement": "none"},
    "block bypass": {},
    "block bypass, carried logits": {"carry": "logits"},
}


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
    """Trains exits of each form on the same states, chooses how to stop on the validation rows, saves the last form's
    adapter; returns the scores on test rows."""
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="right")
    rows, labels = rows_of(folder, tokenizer, options)
    model = with_exits(FORMS[options.forms[-1]], tokenizer, labels, options)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
        states = {name: cache_states(model, rows[name], dtype="float32", progress=True) for name in SPLITS}
    cached = time.perf_counter() - start
    forms: dict[str, Any] = {}
    for form in options.forms:
        model = with_exits(FORMS[form], tokenizer, labels, options)
        fit(model, rows["train"], tokenizer, states["train"], options)
        found = {name: collect_exit_logits(model, rows[name], cached_states=states[name]) for name in SPLITS[1:]}
        forms[form] = scores_of(found)
        print(f"{out.name}, {form}: {forms[form]}", flush=True)
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
        "forms": forms,
        "policy": recorded_fields(chosen),
        "score": point.score,
        "layer_speedup": point.layer_speedup,
        "settings": {name: getattr(options, name) for name in ("epochs", "lr", "suffix", "bf16", "seed", "length")},
        "states": {"seconds": cached, "bytes": sum(kept.nbytes for kept in states.values())},
        "seconds": time.perf_counter() - start,
        "environment": describe(options.threads, "cpu"),
    }
    print(f"{out.name}: best {scores.best:.4f}, {point.score:.4f} at {point.layer_speedup:.1%} saved", flush=True)
    return result


def with_exits(fields: dict[str, Any], tokenizer: Any, labels: list[str], options: argparse.Namespace) -> PeftModel:
    """The decoder with untrained exits of one form."""
    set_seed(options.seed)
    base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels))
    base.config.pad_token_id = tokenizer.pad_token_id
    config = BadgeConfig(task_type="SEQ_CLS", final_exit="exit", label_names=labels, **fields)
    return get_peft_model(base, config).eval()


def scores_of(found: dict[str, ExitLogits]) -> dict[str, Any]:
    """The mean and best of all exits on test rows, and the score at shares of the blocks saved by `max_prob`, whose
    thresholds the validation rows choose."""
    scores, most = exit_scores(found["test"]), 1 - found["test"].exits[0] / found["test"].depth
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where a fixed depth is as good
        goals = [goal for goal in GOALS if goal <= most]
        rules = {goal: calibrate(found["validation"], "max_prob", target_blocks_saved=goal) for goal in goals}
    saved = {str(goal): evaluate_policy(found["test"], rule).score for goal, rule in rules.items()}
    return {"avg": scores.avg, "best": scores.best, "saved": saved}


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
    suffix = tokenizer(options.suffix, add_special_tokens=False)["input_ids"] if options.suffix else []
    lines = {
        name: [json.loads(line) for line in Path(folder, f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in SPLITS
    }
    labels = sorted({str(row["label"]) for row in lines["train"]})
    rows = {}
    for name, found in lines.items():
        order = np.random.default_rng(0).permutation(len(found))[: options.rows if name == "train" else options.others]
        chosen = [found[i] for i in order]
        texts = [row["text"] for row in chosen]
        tokens = tokenizer(texts, truncation=True, max_length=options.length - len(suffix))["input_ids"]
        numbers = [labels.index(str(row["label"])) for row in chosen]
        whole = [own + suffix for own in tokens]
        columns = {"input_ids": whole, "attention_mask": [[1] * len(own) for own in whole]}
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
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of the exits; the last is kept"
    )
    parser.add_argument("--suffix", default="", help="tokens of this text behind each row's own")
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
