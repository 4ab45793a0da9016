"""Trains a classifier that exits early on a GLUE task, chooses how it stops, and scores it on test rows.

    python examples/train_glue.py --task sst2 --output-dir out/sst2
    python examples/train_glue.py --data-dir data/sst2 --model path/to/encoder --output-dir out/sst2

The second line needs no network: `data/sst2` holds JSON lines (glue_data.py says which). Labels may be anything there.
`--backbone lora` (the default) trains a LoRA along with the exits, `full` the whole encoder, as the paper does, and
`frozen` the exits alone. `badge-peft predict`, `sweep` and `export` go on with the folder that this writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from glue_data import load_task
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

import badge_peft


@dataclass
class Arguments:
    """What to train, and on what."""

    output_dir: str = field(metadata={"help": "Folder for the adapter."})
    task: str | None = field(default=None, metadata={"help": "A GLUE task on the Hub: sst2, mrpc, stsb, ..."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with train.jsonl and validation.jsonl."})
    model: str = field(default="google-bert/bert-base-uncased", metadata={"help": "Encoder: a folder or a Hub name."})
    backbone: str = field(default="lora", metadata={"help": "frozen, lora or full."})
    placement: str = field(default="block", metadata={"help": "Where a bypass reads: block, ffn, mhsa or none."})
    r: int = field(default=16, metadata={"help": "Width of the bypasses."})
    exit_type: str = field(default="linear", metadata={"help": "linear, pooled or mha."})
    exit_pooling: str = field(default="auto", metadata={"help": "What an exit reads: auto, cls, mean or last."})
    objective: str = field(default="joint", metadata={"help": "joint, two_stage, alternating, ..."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows."})
    batch_size: int = field(default=32, metadata={"help": "Rows at once."})
    max_length: int = field(default=128, metadata={"help": "Tokens per row."})
    max_rows: int | None = field(default=None, metadata={"help": "At most so many rows of each split."})
    max_score_drop: float = field(default=0.01, metadata={"help": "The most that stopping early may cost."})
    seed: int = field(default=0, metadata={"help": "Of the new weights and the order of the rows."})


def main() -> None:
    """Trains, chooses the policy on validation rows, saves, and prints scores on test rows."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if args.task is None and args.data_dir is None:
        raise SystemExit("say what to train on: --task NAME (from the Hub) or --data-dir FOLDER.")
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task = load_task(args.task, args.data_dir, tokenizer, args.max_length, args.max_rows)

    encoder = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=task.num_labels, ignore_mismatched_sizes=True
    )
    config = badge_peft.BadgeConfig(
        backbone=args.backbone,
        placement=args.placement,
        r=args.r,
        exit_type=args.exit_type,
        exit_pooling=args.exit_pooling,
        final_exit="exit",  # the encoder has no head for this task yet: the last exit is built like the others
        label_names=task.label_names,
        problem_type="regression" if task.label_names is None else "single_label_classification",
    )
    model = get_peft_model(encoder, config)
    model.print_trainable_parameters()

    trainer = badge_peft.MultiExitTrainer(
        model=model,
        args=badge_peft.multi_exit_arguments(
            model,
            args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            seed=args.seed,
            objective=args.objective,
            exit_metric=task.metric,
        ),
        train_dataset=task.splits["train"],
        eval_dataset=task.splits["validation"],
        processing_class=tokenizer,
    )
    trainer.train()

    validation = badge_peft.collect_exit_logits(model, task.splits["validation"])
    chosen = badge_peft.calibrate(validation, policy="auto", max_score_drop=args.max_score_drop, metric=task.metric)
    model.set_early_exit_config(chosen)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    validation.save(Path(args.output_dir, "exit_logits.safetensors"))  # what `badge-peft sweep` reads

    test = badge_peft.collect_exit_logits(model, task.splits["test"])
    scores = badge_peft.exit_scores(test, task.metric)
    early = badge_peft.evaluate_policy(test, chosen, task.metric)
    print(f"\n{task.name}, {task.metric} on {len(test)} test rows")
    for block, score in zip(scores.exit_layers, scores.per_exit, strict=True):
        print(f"  exit {block:2}  {score:.1%}")
    print(f"  S-avg    {scores.avg:.1%}\n  S-best   {scores.best:.1%}")
    print(f"stopping early ({chosen.policy}): {early.score:.1%}, with {early.blocks_saved:.1%} of the blocks saved")
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
