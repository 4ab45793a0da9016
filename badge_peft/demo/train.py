"""Training bypasses and exits on a frozen encoder with transformers' Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from badge_peft.architectures import block_names, get_layout
from badge_peft.config import BadgeConfig
from badge_peft.demo.settings import DemoSettings
from badge_peft.training import make_optimizer


def make_model(path: str, label_names: list[str]) -> PeftModel:
    """The encoder at `path` with a bypass and an exit at every block, and exit 0 on the embeddings.

    Exits read the mean over the tokens, and exit M is one of ours (`final_exit="exit"`): a sentence encoder has no
    head for our labels, and its first token says little.
    """
    with quiet():
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(label_names))
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
    steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
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
            callbacks=[_ProgressBar()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


def _group_by_length() -> dict[str, Any]:
    """Batches of rows of like length, so that little is padded; transformers 5 has renamed the argument."""
    if "train_sampling_strategy" in {f.name for f in fields(TrainingArguments)}:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


class _ProgressBar(TrainerCallback):
    """One bar for the whole training, with the loss (summed over exits) beside it."""

    bar: tqdm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar."""
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step on."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows the loss."""
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self.bar.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' word on the new classification head, which the demo never reads, its loading bars, and
    its warnings to PEFT."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
