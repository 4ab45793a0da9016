"""`train_exits`: one training of an adapter, as `badge-peft train` makes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PrinterCallback, ProgressCallback

from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation import ExitLogits
from badge_peft.model import get_badge_model
from badge_peft.training import MultiExitTrainer, multi_exit_arguments
from badge_peft.training.callbacks import ProgressBar
from badge_peft.utils import distributed
from badge_peft.workflows.base_model import Base
from badge_peft.workflows.settings import TrainingOptions, TrainSettings

Choose = Callable[[], tuple[EarlyExitConfig, dict[str, Any], list[str]]]


@dataclass
class Plan:
    """What a kind of exits is trained with.

    Args:
        base: The model.
        settings: With what was found out of model and rows.
        eval_rows: Encoded rows to evaluate and calibrate on.
        counts: What is trained and calibrated on, in words.
        train: Trains a model; what the report says of it.
        choose: From the exit logits of the evaluation rows these with all that belongs to them, what the report says,
            and a function for the config, what was measured of it, and what the calibration warned of. Where that
            raises ValueError, the adapter is saved with the policy that it has.
    """

    base: Base
    settings: TrainSettings
    eval_rows: Dataset
    counts: tuple[str, str]
    train: Callable[[PeftModel], dict[str, Any]]
    choose: Callable[[PeftModel, ExitLogits], tuple[ExitLogits, dict[str, Any], Choose]]


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
    Without labels the exits follow exit M."""
    distillation = options.distillation
    if distillation is None:
        distillation = 0.0 if learns_labels else 1.0
    rate: dict[str, Any] = {} if options.backbone_lr is None else {"learning_rate": options.backbone_lr}
    return fit(
        model,
        rows,
        collator(get_badge_model(model).config_of().reads_tokens, tokenizer),
        options,
        states,
        progress=progress,
        objective=options.objective,
        depth=options.depth,
        distillation=distillation,
        exit_weights=options.exit_weights,
        per_device_train_batch_size=distributed.rows_per_device(options.batch_size),
        logging_steps=max(1, options.epochs * -(-len(rows) // options.batch_size) // 50),
        label_names=["labels"],
        **rate,
    )


def fit(
    model: PeftModel,
    rows: Any,
    collate: Any,
    options: TrainingOptions,
    states: CachedStates | None = None,
    trainer: Mapping[str, Any] = MappingProxyType({}),
    progress: bool = True,
    **arguments: Any,
) -> dict[str, Any]:
    """One training, with more of what its `trainer` and its arguments take. For the report: `training_seconds`, and
    what was kept of the `states`."""
    start = time.perf_counter()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = MultiExitTrainer(
            model=model,
            args=multi_exit_arguments(
                model,
                folder,
                adapter_learning_rate=options.adapter_lr,
                num_train_epochs=options.epochs,
                seed=options.seed,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
                disable_tqdm=not progress,
                **arguments,
            ),
            train_dataset=rows,
            data_collator=collate,
            cache_states=(False if options.no_cache_states else "auto") if states is None else states,
            **trainer,
        )
        _run(made, progress)
    model.eval()
    kept = {name: value for name, value in made.state_cache.items() if name != "where"}
    return {"training_seconds": time.perf_counter() - start, "states": kept}


def collator(tokens: bool, tokenizer: Any) -> Any:
    """Pads rows, and labels where each token has one."""
    return DataCollatorForTokenClassification(tokenizer) if tokens else DataCollatorWithPadding(tokenizer)


def _run(trainer: MultiExitTrainer, progress: bool) -> None:
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
