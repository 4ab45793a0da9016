"""Changes one field of the config at a time, trains, and compares the exits: placement, r, exit type, no bypass.

    python examples/ablate_placement.py --task rte --output results.json
    python examples/ablate_placement.py --data-dir data/rte --model path/to/encoder --seeds 0 1 2 --output results.json

Everything else is held fixed: data, seed, learning rates. That suffices for a first look. A fair comparison also
searches the learning rates of each variant, as benchmarks/paper.py does for the tables of the paper.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from glue_data import Task, load_task
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

import badge_peft

DEFAULT = {"placement": "block", "r": 16, "exit_type": "linear"}
CHANGES: list[dict[str, Any]] = [
    {},
    {"placement": "ffn"},
    {"placement": "mhsa"},
    {"placement": "none"},
    {"r": 4},
    {"r": 64},
    {"exit_type": "pooled"},
    {"exit_type": "mha"},
    {"exit_type": "pooled", "placement": "none"},  # against the exit type above, without its bypass
    {"exit_type": "mha", "placement": "none"},
]


@dataclass
class Arguments:
    """The task, the encoder, and which variants."""

    task: str | None = field(default=None, metadata={"help": "A GLUE task on the Hub: rte, mrpc, sst2, ..."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with train.jsonl and validation.jsonl."})
    model: str = field(default="google-bert/bert-base-uncased", metadata={"help": "Encoder: a folder or a Hub name."})
    backbone: str = field(default="frozen", metadata={"help": "frozen, lora or full; the same for all variants."})
    exit_pooling: str = field(default="auto", metadata={"help": "What an exit reads: auto, cls, mean or last."})
    only: list[str] | None = field(default=None, metadata={"help": "Fields to change: placement, r, exit_type."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run of each variant per seed."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows."})
    batch_size: int = field(default=32, metadata={"help": "Rows at once."})
    max_length: int = field(default=128, metadata={"help": "Tokens per row."})
    max_rows: int | None = field(default=None, metadata={"help": "At most so many rows of each split."})
    output: str | None = field(default=None, metadata={"help": "JSON file for all numbers."})


def run(task: Task, tokenizer: Any, args: Arguments, fields: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains one variant; its scores on the test rows, and how much was trained."""
    set_seed(seed)
    encoder = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=task.num_labels, ignore_mismatched_sizes=True
    )
    config = badge_peft.BadgeConfig(
        backbone=args.backbone,
        exit_pooling=args.exit_pooling,
        final_exit="exit",
        problem_type="regression" if task.label_names is None else "single_label_classification",
        **fields,
    )
    model = get_peft_model(encoder, config)
    with TemporaryDirectory() as folder:
        arguments = badge_peft.multi_exit_arguments(
            model,
            folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            seed=seed,
            eval_strategy="no",  # the last step counts: no variant is favored by a choice among checkpoints
            save_strategy="no",
            load_best_model_at_end=False,
            logging_strategy="no",
            disable_tqdm=True,
        )
        badge_peft.MultiExitTrainer(
            model=model, args=arguments, train_dataset=task.splits["train"], processing_class=tokenizer
        ).train()
    scores = badge_peft.exit_scores(badge_peft.collect_exit_logits(model, task.splits["test"]), task.metric)
    trained = model.get_nb_trainable_parameters()[0]
    print(f"{fields}, seed {seed}: S-avg {scores.avg:.1%}, S-best {scores.best:.1%}", flush=True)
    return {"trained": trained, "s_avg": scores.avg, "s_best": scores.best, "per_exit": scores.per_exit}


def spread(scores: list[float]) -> str:
    """The median of the seeds, and how far apart they are."""
    extremes = f" ({min(scores):.1%}-{max(scores):.1%})" if len(scores) > 1 else ""
    return f"{median(scores):.1%}{extremes}"


def main() -> None:
    """Runs every variant with every seed and prints a row for each variant."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if args.task is None and args.data_dir is None:
        raise SystemExit("say what to train on: --task NAME (from the Hub) or --data-dir FOLDER.")
    if not set(args.only or ()) <= DEFAULT.keys():
        raise SystemExit(f"--only {' '.join(args.only)} is not allowed: any of {', '.join(DEFAULT)}.")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task = load_task(args.task, args.data_dir, tokenizer, args.max_length, args.max_rows)
    results = []
    for change in CHANGES:
        if args.only is None or set(change) <= set(args.only):
            runs = [run(task, tokenizer, args, {**DEFAULT, **change}, seed) for seed in args.seeds]
            results.append({**DEFAULT, **change, "runs": runs})
            if args.output is not None:  # what is done is not lost
                Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    seeds = "one seed" if len(args.seeds) == 1 else f"median (range) of {len(args.seeds)} seeds"
    print(f"\n{task.name}, {task.metric} on {len(task.splits['test'])} test rows, {seeds}")
    print("| placement | r | exit_type | parameters | S-avg | S-best |\n|---|---|---|---|---|---|")
    for row in results:
        width = "-" if row["placement"] == "none" else row["r"]
        avg, best = (spread([r[name] for r in row["runs"]]) for name in ("s_avg", "s_best"))
        trained = f"{row['runs'][0]['trained']:,}"
        print(f"| {row['placement']} | {width} | {row['exit_type']} | {trained} | {avg} | {best} |")


if __name__ == "__main__":
    main()
