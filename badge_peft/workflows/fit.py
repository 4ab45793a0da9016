"""`train_exits`: one training of an adapter, as `badge-peft train` makes it."""

from __future__ import annotations

import time
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    ProgressCallback,
)

from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.model import get_badge_model
from badge_peft.training import MultiExitTrainer, multi_exit_arguments
from badge_peft.training.callbacks import ProgressBar
from badge_peft.utils import distributed
from badge_peft.workflows.settings import TrainingOptions


def train_exits(
    model: PeftModel,
    rows: Dataset,
    tokenizer: Any,
    options: TrainingOptions,
    learns_labels: bool,
    states: CachedStates | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains for `options.epochs`; the last state counts, so that the evaluation rows choose nothing but the policy.
    Without labels the exits follow exit M.

    Args:
        model: With an untrained adapter.
        rows: Token columns, and `labels` where the exits learn from them.
        tokenizer: Pads.
        options: How.
        learns_labels: Whether from labels.
        states: Of the rows, where they have been computed.
        progress: Show a progress bar.

    Returns:
        For the report: `training_seconds`, and what was kept of the `states`.
    """
    start = time.perf_counter()
    distillation = options.distillation
    if distillation is None:
        distillation = 0.0 if learns_labels else 1.0
    steps = options.epochs * -(-len(rows) // options.batch_size)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = multi_exit_arguments(
            model,
            folder,
            objective=options.objective,
            depth=options.depth,
            distillation=distillation,
            exit_weights=options.exit_weights,
            adapter_learning_rate=options.adapter_lr,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=distributed.rows_per_device(options.batch_size),
            seed=options.seed,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            logging_steps=max(1, steps // 50),
            label_names=["labels"],
            disable_tqdm=not progress,
            **({} if options.backbone_lr is None else {"learning_rate": options.backbone_lr}),
        )
        trainer = MultiExitTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator(get_badge_model(model).config_of().reads_tokens, tokenizer),
            cache_states=(False if options.no_cache_states else "auto") if states is None else states,
        )
        run(trainer, progress)
    model.eval()
    kept = {name: value for name, value in trainer.state_cache.items() if name != "where"}
    return {"training_seconds": time.perf_counter() - start, "states": kept}


def collator(tokens: bool, tokenizer: Any) -> Any:
    """Pads rows, and labels where each token has one."""
    return DataCollatorForTokenClassification(tokenizer) if tokens else DataCollatorWithPadding(tokenizer)


def run(trainer: MultiExitTrainer, progress: bool = True) -> None:
    """Trains with one progress bar, or none, in place of what transformers prints."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    bar = ProgressBar()
    if progress:
        trainer.add_callback(bar)
    try:
        trainer.train()
    finally:
        if bar.training_bar is not None:  # an error has a line of its own
            bar.training_bar.close()
