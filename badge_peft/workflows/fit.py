"""One training of an adapter, as `badge-peft train` makes it: of exits that classify, or that rank."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PrinterCallback, ProgressCallback

from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.model import get_badge_model
from badge_peft.training import (
    MultiExitTrainer,
    QueryCollator,
    RankingDistillation,
    multi_exit_arguments,
    query_batches,
)
from badge_peft.training.callbacks import ProgressBar
from badge_peft.training.sampling import sampling
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


def train_rankings(
    model: PeftModel, rows: Dataset, tokenizer: Any, options: TrainingOptions, queries: Sequence[str]
) -> dict[str, Any]:
    """As `train_exits`, in batches of whole queries as far as they fit; exits follow the scores of full depth."""
    numbers = {query: number for number, query in enumerate(dict.fromkeys(queries))}
    items = [
        [{**rows[i], "groups": numbers[queries[i]]} for i in batch]
        for batch in query_batches(queries, distributed.rows_per_device(options.batch_size), options.seed)
    ]
    return fit(
        model,
        items,
        QueryCollator(DataCollatorWithPadding(tokenizer)),
        options,
        trainer={"objective": RankingDistillation()},
        per_device_train_batch_size=1,  # an item is a batch
        logging_steps=max(1, options.epochs * len(items) // 50),
        remove_unused_columns=False,
        **sampling(by_length=False),
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
