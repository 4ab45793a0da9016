"""A decoder as a classifier with a frozen backbone: score per exit, and what leaves within one point save.

    python benchmarks/decoders.py MODEL banking77=DIR sst2=DIR --rows 4000 --bf16   # trains exits, scores them
    python benchmarks/decoders.py MODEL banking77=DIR sst2=DIR --time 100           # and then, on a quiet machine
    python benchmarks/decoders.py --docs docs/results/decoders.md                   # measures nothing: the page

MODEL is a folder of a causal language model with its tokenizer; a DIR has `train.jsonl`, `validation.jsonl` and
`test.jsonl`, with `text` and `label` on each line. No block runs in training: the states at the last token of each row
are computed once (with `--bf16` in bfloat16, as a CPU with AMX does it quickly), and all exits are trained on them,
in each of the `FORMS`. The last form is what is saved, and what the page is about.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, calibrated, describe, fit, markdown, parser, read_lines, run, versions
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from badge_peft import BadgeConfig, ExitLogits, collect_exit_logits, load_pretrained
from badge_peft.evaluation import evaluate_policy, exit_scores, measure_latency
from badge_peft.training import cache_states
from badge_peft.workflows.evaluate import recorded_fields

BATCH = {"per_device_train_batch_size": 32}
SPLITS = ("train", "validation", "test")
DROP = 0.01
GOALS = (0.25, 0.5, 0.66, 0.75)
#: Fields of `BadgeConfig`.
FORMS: dict[str, dict[str, Any]] = {
    "no bypass": {"placement": "none"},
    "block bypass": {},
    "block bypass, carried logits": {"carry": "logits"},
}


def measure(options: argparse.Namespace, results: Results) -> None:
    """Each task's exits where there is no adapter, and their times where they are asked for."""
    for task in options.data:
        name, _, folder = task.partition("=")
        out = Path(options.adapters, name)
        if not (out / "adapter_config.json").exists():
            results.keep(f"scores/{name}", train(folder, out, options))
        if options.time:
            results.keep(f"time/{name}", clock(folder, out, options))


def train(folder: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains exits of each form on the same states, chooses how to stop on the validation rows, saves the last form's
    adapter; returns the scores on test rows."""
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="right")
    rows, labels = rows_of(folder, tokenizer, options)
    model = with_exits(FORMS[options.forms[-1]], tokenizer, labels, options)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
        states = {name: cache_states(model, rows[name], dtype="float32", progress=True) for name in SPLITS}
    forms: dict[str, Any] = {}
    for form in options.forms:
        model = with_exits(FORMS[form], tokenizer, labels, options)
        steps = {
            "num_train_epochs": options.epochs,
            "adapter_learning_rate": options.lr,
            "seed": options.seed,
        }
        fit(
            model,
            rows["train"],
            DataCollatorWithPadding(tokenizer),
            cache_states=states["train"],
            **steps,
            **BATCH,
        )
        found = {
            name: collect_exit_logits(
                model,
                rows[name],
                cached_states=states[name],
            )
            for name in SPLITS[1:]
        }
        forms[form] = scores_of(found)
        print(f"{out.name}, {form}: {forms[form]}", flush=True)
    chosen = calibrated(found["validation"], options.policy, max_score_drop=DROP)
    model.set_early_exit_config(chosen)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    scores = exit_scores(found["test"])
    point = evaluate_policy(found["test"], chosen)
    result = {
        "rows": {name: len(rows[name]) for name in SPLITS},
        "exit_layers": scores.exit_layers,
        "per_exit": scores.per_exit,
        "avg": scores.avg,
        "best": scores.best,
        "forms": forms,
        "policy": recorded_fields(chosen),
        "score": point.score,
        "blocks_saved": point.blocks_saved,
        "settings": {name: getattr(options, name) for name in ("epochs", "lr", "bf16", "seed", "length")},
        "environment": describe(options.threads),
    }
    print(f"{out.name}: best {scores.best:.4f}, {point.score:.4f} at {point.blocks_saved:.1%} saved", flush=True)
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
    scores = exit_scores(found["test"])
    most = 1 - found["test"].exits[0] / found["test"].depth
    goals = [goal for goal in GOALS if goal <= most]
    chosen = {goal: calibrated(found["validation"], "max_prob", target_blocks_saved=goal) for goal in goals}
    saved = {str(goal): evaluate_policy(found["test"], config).score for goal, config in chosen.items()}
    return {"avg": scores.avg, "best": scores.best, "saved": saved}


def clock(folder: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times the first test texts one by one, in float32, with early exits and at full depth without exits."""
    model = load_pretrained(str(out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = rows_of(folder, tokenizer, options)[0]["test"].select(range(options.time))
    found = measure_latency(model, rows, warmup=5)
    return {
        "rows": len(found),
        "full_ms": found.full_depth_mean_ms,
        "mean_ms": found.mean_ms,
        "time_saved": found.time_saved,
        "blocks_saved": found.blocks_saved,
        "environment": describe(options.threads),
    }


def rows_of(folder: str, tokenizer: Any, options: argparse.Namespace) -> tuple[dict[str, Dataset], list[str]]:
    """Tokenized rows of each split, at most as many as asked for, in a fixed random order; and the labels' names."""
    lines = {name: read_lines(Path(folder, f"{name}.jsonl")) for name in SPLITS}
    labels = sorted({str(row["label"]) for row in lines["train"]})
    rows = {}
    for name, found in lines.items():
        order = np.random.default_rng(0).permutation(len(found))[: options.rows if name == "train" else options.others]
        chosen = [found[i] for i in order]
        texts = [row["text"] for row in chosen]
        tokens = tokenizer(texts, truncation=True, max_length=options.length)["input_ids"]
        numbers = [labels.index(str(row["label"])) for row in chosen]
        columns = {"input_ids": tokens, "attention_mask": [[1] * len(own) for own in tokens]}
        rows[name] = Dataset.from_dict({**columns, "labels": numbers})
    return rows, labels


def page(results: Results) -> str:
    """Markdown."""
    scores = results.below("scores")
    times = results.below("time")
    first = next(iter(scores.values()))
    where = first["environment"]
    settings = first["settings"]
    forms = next(iter(first["forms"].values()))
    rows = ", ".join(f"{name} {' / '.join(f'{n:,}' for n in own['rows'].values())}" for name, own in scores.items())
    given = f"--rows {first['rows']['train']} --epochs {settings['epochs']} --lr {settings['lr']}"
    command = f"python benchmarks/decoders.py SmolLM2-135M {' '.join(f'{name}={name}' for name in scores)}"
    blocks = [m for m in first["exit_layers"] if m in (1, 2) or m % 3 == 0]
    said, exits, grid, saved = [], [], [], []
    for name, own in scores.items():
        known = dict(zip(own["exit_layers"], own["per_exit"], strict=True))
        exits.append([name, *(f"{100 * known[m]:.1f}" for m in blocks), f"{100 * own['avg']:.1f}"])
        for form, one in own["forms"].items():
            values = (one["avg"], one["best"], *one["saved"].values())
            grid.append([name, form, *(f"{100 * value:.1f}" for value in values)])
        clock, of_time = ["-"] * 3, ""
        if (timed := times.get(name)) is not None:
            of_time = f" and {timed['time_saved']:.0%} of the time"
            note = f"{timed['blocks_saved']:.1%} of the blocks, {timed['rows']} texts"
            clock = [f"{timed['full_ms']:.0f}", f"{timed['mean_ms']:.0f}", f"{timed['time_saved']:.1%} ({note})"]
        best = 100 * own["best"]
        early = 100 * own["score"]
        said.append(f"{name}: {own['blocks_saved']:.0%} of the blocks{of_time} saved for {best - early:.1f} points")
        policy = own["policy"]["policy"]
        saved.append([name, policy, f"{best:.1f}", f"{early:.1f}", f"{own['blocks_saved']:.1%}", *clock])
    heads = ["", "policy", "best exit", "with early exits", "blocks saved", "full depth, ms", "early exits, ms"]
    return f"""# A decoder as a classifier

SmolLM2-135M (30 blocks, width 576; weights dequantized from 4 bits), frozen, read at the last token of a text.

**{"; ".join(said)}.**

AdaInfer (Fan et al., "Not All Layers of LLMs Are Necessary During Inference", 2024), which also leaves the model as it
is, reports 17.8% on average and up to 43% on sentiment, of larger models prompted for the task, with their own head
and without trained exits.

Made by

```bash
{command} {given}{" --bf16" if settings["bf16"] else ""}
{command} --time N
python benchmarks/decoders.py --docs docs/results/decoders.md
```

on {where["date"]}: {where["cpu"]}; {versions(where)}. One seed. Rows of training / validation / test: {rows}.

## Accuracy per exit, on test rows

{markdown(["", *map(str, blocks), "S-avg"], exits)}

## What a bypass, and the logits of the exit before, add

Mean and best of all exits, and the score with a share of the blocks saved by `max_prob`; thresholds are chosen on the
validation rows. The last form is the one that the rest of this page is about.

{markdown(["", "exits", "S-avg", "S-best", *(f"{float(goal):.0%} saved" for goal in forms["saved"])], grid)}

## What is saved within one point

`calibrate(policy="auto", max_score_drop=0.01)` chooses on the validation rows. Time is that of a text alone, float32,
against the same model at full depth without exits.

{markdown([*heads, "time saved"], saved)}
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, "runs/decoders.json")
    options.add_argument("model", nargs="?", help="folder of a causal language model")
    options.add_argument("data", nargs="*", metavar="TASK=DIR", help="tasks, with the folders of their rows")
    options.add_argument(
        "--adapters",
        default="runs/decoders",
        help="where the adapters are; what is there is used",
    )
    options.add_argument("--rows", type=int, default=4000, help="of training, at most")
    options.add_argument("--others", type=int, default=1000, help="of validation, and of test, at most")
    options.add_argument("--length", type=int, default=64, help="tokens of a row, at most")
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--lr", type=float, default=5e-3)
    options.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="the last is kept")
    options.add_argument("--policy", default="auto", help="as `calibrate` takes it")
    options.add_argument("--bf16", action="store_true", help="compute the states in bfloat16")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--time", type=int, default=0, metavar="TEXTS", help="also time as many test texts")
    return run(options.parse_args(arguments), measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
