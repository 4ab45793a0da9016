"""Puts exits on a classifier that is in service, from nothing but texts that it has seen. Its weights stay as is.

    python examples/after_deployment.py --model my-model --texts requests.txt --output-dir my-exits

`my-model` is a fine-tuned classifier, a folder or a Hub name. `requests.txt` has one text per line; a jsonl, csv or
parquet file has a column `text` (and `text_pair`). Labels are not needed: the exits learn to say what the model says.
`badge-peft train --keep-head` does the same with more options; this is how it is done in Python.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

import badge_peft


@dataclass
class Arguments:
    """The classifier, its texts, and what may be lost."""

    model: str = field(metadata={"help": "The classifier: a folder or a Hub name."})
    texts: str = field(metadata={"help": "txt, jsonl, csv or parquet file with texts like those in service."})
    output_dir: str = field(metadata={"help": "Folder for the adapter and report.json."})
    exit_pooling: str = field(default="auto", metadata={"help": "What an exit reads: auto, cls, mean or last."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over the texts."})
    batch_size: int = field(default=32, metadata={"help": "Texts at once."})
    max_length: int = field(default=128, metadata={"help": "Tokens per text, as in service."})
    max_score_drop: float = field(
        default=0.01, metadata={"help": "Share of the texts whose answer may change by stopping early."}
    )
    timed_rows: int = field(default=100, metadata={"help": "Texts to time, one by one."})
    seed: int = field(default=0, metadata={"help": "Of the new weights and the order of the texts."})


def read_texts(path: str) -> Dataset:
    """Every text (or pair of texts) once."""
    kind = {".txt": "text", ".jsonl": "json", ".json": "json"}.get(Path(path).suffix, Path(path).suffix[1:])
    rows = load_dataset(kind, data_files=path, split="train")
    columns = [column for column in ("text", "text_pair") if column in rows.column_names]
    if "text" not in columns:
        raise SystemExit(f"{path} has no column 'text', only {', '.join(rows.column_names)}.")
    different = dict.fromkeys(row for row in zip(*(rows[column] for column in columns), strict=True) if all(row))
    return Dataset.from_dict(dict(zip(columns, map(list, zip(*different, strict=True)), strict=True)))


@torch.inference_mode()
def same_answers(model: torch.nn.Module, name: str, rows: Dataset, collator: DataCollatorWithPadding) -> bool:
    """Whether full depth gives the logits of the checkpoint `name`, to the last bit, on the same batches."""
    checkpoint = AutoModelForSequenceClassification.from_pretrained(name).to(model.device).eval()
    for start in range(0, len(rows), 32):
        batch = collator([rows[i] for i in range(start, min(start + 32, len(rows)))]).to(model.device)
        if not torch.equal(checkpoint(**batch).logits, model(**batch).logits):
            return False
    return True


def main() -> None:
    """Trains exits, chooses the policy, checks that nothing else has changed, and reports."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    limit = min(args.max_length, tokenizer.model_max_length)
    texts = read_texts(args.texts)
    rows = texts.map(
        lambda part: tokenizer(part["text"], part.get("text_pair"), truncation=True, max_length=limit),
        batched=True,
        remove_columns=texts.column_names,
    ).train_test_split(test_size=0.2, seed=args.seed)

    classifier = AutoModelForSequenceClassification.from_pretrained(args.model)
    config = badge_peft.BadgeConfig(backbone="frozen", train_head=False, exit_pooling=args.exit_pooling)
    model = get_peft_model(classifier, config)
    model.print_trainable_parameters()
    trainer = badge_peft.MultiExitTrainer(
        model=model,
        args=badge_peft.multi_exit_arguments(
            model,
            args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            seed=args.seed,
            eval_strategy="no",  # needs labels
            save_strategy="no",
            load_best_model_at_end=False,
            distillation=1.0,  # follow the model's own last layer
        ),
        train_dataset=rows["train"],
        processing_class=tokenizer,
    )
    trainer.train()

    # Without labels a score is the share of the texts that get full depth's answer.
    exit_logits = badge_peft.collect_exit_logits(model, rows["test"])
    chosen = badge_peft.calibrate(exit_logits, policy="auto", max_score_drop=args.max_score_drop)
    model.set_early_exit_config(chosen)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    exit_logits.save(Path(args.output_dir, "exit_logits.safetensors"))  # what `badge-peft sweep` reads

    loaded = badge_peft.load_pretrained(args.output_dir).to(model.device)
    equal = same_answers(loaded, args.model, rows["test"], DataCollatorWithPadding(tokenizer))
    timed = rows["test"].select(range(min(args.timed_rows, len(rows["test"]))))
    latency = badge_peft.measure_latency(loaded, timed)
    report = {
        "full_depth_is_checkpoint": equal,
        "held_out_texts": len(rows["test"]),
        "same_answer_per_exit": chosen.calibration["exit_scores"],
        "policy": chosen.policy,
        "same_answer": chosen.calibration["score"],
        "blocks_saved": chosen.calibration["blocks_saved"],
        "time_saved": latency.time_saved,
        "p50_ms": latency.p50_ms,
        "full_depth_p50_ms": latency.full_depth_p50_ms,
    }
    Path(args.output_dir, "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    if not equal:
        raise SystemExit(f"full depth does NOT answer as {args.model} does: do not put this adapter into service.")


if __name__ == "__main__":
    main()
