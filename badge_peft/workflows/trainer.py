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
from badge_peft.workflows.settings import TrainingOptions


def train_exits(
    model: PeftModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainingOptions,
    learns_labels: bool,
) -> None:
    """Trains for `options.epochs`; the last state counts, so that the evaluation rows choose nothing but the policy.

    Args:
        model: With an adapter; is in eval mode afterwards.
        rows: With `labels`, where they are learned from.
        tokenizer: Pads.
        options: Objective, rates, epochs, batch size (of a step, over all processes) and seed.
        learns_labels: False: the exits follow exit M.
    """
    distillation = options.distillation
    if distillation is None:
        distillation = 0.0 if learns_labels else 1.0
    steps = options.epochs * -(-len(rows) // options.batch_size)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        overrides = {} if options.backbone_lr is None else {"learning_rate": options.backbone_lr}
        arguments = multi_exit_arguments(
            model,
            folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size // distributed.rank_world()[1],
            seed=options.seed,
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
            objective=options.objective,
            depth=options.depth,
            distillation=distillation,
            adapter_learning_rate=options.adapter_lr,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar())
        trainer.train()
    model.eval()
