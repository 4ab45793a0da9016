"""What would fail in the middle of a training, said before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from badge_peft.utils.distributed import launched

if TYPE_CHECKING:
    from badge_peft.training.trainer import MultiExitTrainer

_LABELS = {"label", "labels", "label_ids"}  # what transformers' collators make labels of


def check_processes(trainer: MultiExitTrainer) -> None:
    """Refuses several processes of which each would train by itself, and all write the same files.

    Raises:
        ValueError: a launcher started several, and Trainer knows of one.
    """
    size = launched()[1]
    if size > 1 and trainer.args.world_size == 1:
        raise ValueError(
            f"{size} processes were started, but each would train alone: on CPUs, Trainer has to be told. Make the "
            "arguments with multi_exit_arguments, or pass use_cpu=True to TrainingArguments."
        )


def check_final_exit(trainer: MultiExitTrainer) -> None:
    """Refuses an objective with steps of exit M alone where nothing that exit M reads is trained.

    Raises:
        ValueError: such steps would have no gradient.
    """
    objective = trainer.exit_objective
    if trainer.trains_final_exit or not objective.final_exit_alone(trainer.exits):
        return
    raise ValueError(
        f"{type(objective).__name__} trains exit {trainer.exits[-1]} alone, at all steps or at some, but nothing that "
        "this exit reads is trainable: the backbone, the model's own head and the final exit are frozen. Use "
        "objective='joint', or make the adapter with train_head=True, final_exit='exit' or another backbone mode."
    )


def check_evaluation(trainer: MultiExitTrainer) -> None:
    """Refuses evaluations that cannot give the score by which the best checkpoint is chosen.

    Raises:
        ValueError: the evaluation rows have no labels.
    """
    args, data = trainer.args, trainer.eval_dataset
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no" or data is None:
        return
    sets = [data]
    if isinstance(data, dict):  # their scores are called eval_<name>_s_avg
        named = [v for k, v in data.items() if metric.removeprefix("eval_").startswith(f"{k}_")]
        sets = named or list(data.values())
    if not any(_has_labels(trainer, rows) for rows in sets):
        raise ValueError(
            f"metric_for_best_model={metric!r} cannot be computed: the evaluation rows have no labels. Give "
            f"eval_dataset a column {trainer.label_names[0] if trainer.label_names else 'labels'!r}, or train with "
            "eval_strategy='no' and load_best_model_at_end=False."
        )


def _has_labels(trainer: MultiExitTrainer, rows: Any) -> bool:
    columns = getattr(rows, "column_names", None)
    if columns is None and not isinstance(rows, IterableDataset) and len(rows) and isinstance(rows[0], Mapping):
        columns = rows[0].keys()
    if columns is not None and {*_LABELS, *trainer.label_names} & set(columns):
        return True
    with torch.random.fork_rng(devices=[]):  # a collator may make labels of any column: look at a batch
        batch: Any = next(iter(trainer.get_eval_dataloader(rows)), {})
    return bool(trainer.label_names) and all(batch.get(name) is not None for name in trainer.label_names)
