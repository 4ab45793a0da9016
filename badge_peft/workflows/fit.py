"""Trains the exits of a model on encoded rows."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from badge_peft.training import MultiExitTrainer, multi_exit_arguments
from badge_peft.training.callbacks import ProgressBar
from badge_peft.utils import distributed
from badge_peft.workflows.settings import TrainSettings


def fit(
    model: PeftModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    learns_labels: bool,
) -> None:
    """Trains for `settings.epochs`; the last state counts, so that the evaluation rows choose nothing but the rule.

    Args:
        model: With an adapter; is in eval mode afterwards.
        rows: With `labels`, where they are learned from.
        tokenizer: Pads.
        settings: Objective, rates, epochs, batch size (of a step, over all processes) and seed.
        learns_labels: False: the exits follow exit M.
    """
    distillation = settings.distillation
    if distillation is None:
        distillation = 0.0 if learns_labels else 1.0
    steps = settings.epochs * -(-len(rows) // settings.batch_size)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        overrides = {} if settings.backbone_lr is None else {"learning_rate": settings.backbone_lr}
        arguments = multi_exit_arguments(
            model,
            folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size // distributed.together()[1],
            seed=settings.seed,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            logging_steps=max(1, steps // 50),
            dataloader_pin_memory=torch.cuda.is_available(),
            label_names=["labels"],
            **overrides,
        )
        trainer = MultiExitTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            objective=settings.objective,
            depth=settings.depth,
            distillation=distillation,
            adapter_learning_rate=settings.adapter_lr,
            callbacks=[ProgressBar()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    model.eval()
