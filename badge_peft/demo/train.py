"""Training bypasses and exits on a frozen encoder with transformers' Trainer."""

from __future__ import annotations

import math
from dataclasses import fields
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from badge_peft.demo.settings import DemoSettings
from badge_peft.training import make_optimizer
from badge_peft.training.callbacks import ProgressBar
from badge_peft.tuner.architectures import block_names, get_layout
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils.logs import quiet

_BATCH_SIZE = 32


def make_model(path: str, label_names: list[str]) -> PeftModel:
    """The encoder at `path` with a bypass and an exit at every block, and exit 0 on the embeddings.

    Exits read the mean over the tokens, and exit M is one of ours (`final_exit="exit"`): a sentence encoder has no
    head for our labels, and its first token says little.
    """
    with quiet():
        base = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=len(label_names), ignore_mismatched_sizes=True
        )
    base.config.id2label = dict(enumerate(label_names))
    base.config.label2id = {name: i for i, name in enumerate(label_names)}
    blocks = len(block_names(base, get_layout(base)))
    config = BadgeConfig(
        task_type="SEQ_CLS",
        exit_layers=list(range(blocks + 1)),
        exit_pooling="mean",
        final_exit="exit",
    )
    with quiet():
        return get_peft_model(base, config)


def train(model: PeftModel, rows: Dataset, tokenizer: Any, settings: DemoSettings) -> None:
    """Trains what is trainable in `model`: bypasses and exits."""
    steps = settings.epochs * math.ceil(len(rows) / _BATCH_SIZE)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=_BATCH_SIZE,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            label_names=["labels"],
            save_strategy="no",
            logging_steps=max(1, steps // 50),
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            seed=settings.seed,
            **_group_by_length(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            optimizers=(make_optimizer(model, adapter_lr=settings.learning_rate), None),
            callbacks=[ProgressBar()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


def _group_by_length() -> dict[str, Any]:
    """Batches of rows of like length, so that little is padded; transformers 5 has renamed the argument."""
    if "train_sampling_strategy" in {f.name for f in fields(TrainingArguments)}:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}
