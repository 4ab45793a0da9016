"""Refuses, before a training starts, what would fail in the middle of it, and stops one that has run into numbers that
are not finite: it cannot recover, and its exits say nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from badge_peft.training.caching import LABELS
from badge_peft.training.objectives import Objective
from badge_peft.utils.distributed import env_rank_world


def check_options(args: TrainingArguments, optimizer: tuple[Any, dict[str, Any]] | None) -> None:
    """Refuses scores of one batch at a time, which do not add up to those of all rows, and in Trainer's
    `optimizer_cls_and_kwargs` a learning rate that would not be used."""
    if args.batch_eval_metrics:
        raise ValueError(
            "batch_eval_metrics=True is not allowed: the scores of the exits are those of all rows at once. Leave it "
            "out."
        )
    if optimizer is not None and "lr" in optimizer[1]:
        raise ValueError(
            f"optimizer_cls_and_kwargs has lr={optimizer[1]['lr']}, but each part of the model has its own rate: "
            "leave it out, and set adapter_learning_rate, head_learning_rate and learning_rate."
        )


def check_training(args: TrainingArguments, adapter_name: str, replaces_optimizer: bool) -> None:
    """Refuses several processes of which each would train by itself, and all write the same files; to load, at the
    end, the weights of another adapter; and an optimizer, or a schedule, that stages would replace."""
    size = env_rank_world()[1]
    if size > 1 and args.world_size == 1:
        raise ValueError(
            f"{size} processes were started, but each would train alone: on CPUs, Trainer does not notice. Make the "
            "arguments with multi_exit_arguments, or pass use_cpu=True to TrainingArguments."
        )
    if args.load_best_model_at_end and adapter_name != "default":
        raise ValueError(
            f"load_best_model_at_end=True is not allowed with the active adapter {adapter_name!r}: transformers loads "
            "the weights in the checkpoint's own folder, which are those of the adapter 'default'. Call the adapter "
            "that is trained 'default', or set load_best_model_at_end=False."
        )
    if replaces_optimizer:
        raise ValueError(
            "optimizers=... is not allowed with objective='two_stage': each stage has an optimizer of its own "
            "parameters. Leave it out, and set optim or optimizer_cls_and_kwargs and the rates in the arguments."
        )


def check_final_exit(objective: Objective, exits: list[int], trains_final_exit: bool) -> None:
    """Refuses an objective with steps of exit M alone where nothing that exit M reads is trained."""
    if not trains_final_exit and objective.final_exit_alone(exits):
        raise ValueError(
            f"{type(objective).__name__} trains exit {exits[-1]} alone, at all steps or at some, but nothing that "
            "this exit reads is trainable: the backbone, the model's own head and the final exit are frozen. Use "
            "objective='joint', or make the adapter with train_head=True, final_exit='exit' or another backbone mode."
        )


def check_evaluation(
    args: TrainingArguments,
    eval_dataset: Any,
    label_names: Sequence[str],
    batches: Callable[[Any], Iterable[Mapping[str, Any]]],
) -> None:
    """Refuses evaluations that cannot give the score by which the best checkpoint is chosen."""
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no" or eval_dataset is None:
        return
    rows = eval_dataset
    if isinstance(eval_dataset, dict):
        chosen = chosen_set(metric, eval_dataset)
        if chosen is None:
            raise ValueError(
                f"metric_for_best_model={metric!r} cannot be computed: eval_dataset has several sets, and the scores "
                f"of each begin with its name, {', '.join(map(repr, eval_dataset))}. Name the one that chooses, such "
                f"as metric_for_best_model='{next(iter(eval_dataset), 'name')}_s_avg'."
            )
        rows = eval_dataset[chosen]
    if not _has_labels(rows, label_names, batches):
        raise ValueError(
            f"metric_for_best_model={metric!r} cannot be computed: the evaluation rows have no labels. Give "
            f"eval_dataset a column {label_names[0] if label_names else 'labels'!r}, or train with "
            "eval_strategy='no' and load_best_model_at_end=False."
        )


def chosen_set(metric: str | None, eval_dataset: Any) -> str | None:
    """The name of the evaluation set whose score `metric` is, as `a_s_avg` and `eval_a_s_avg` are those of `a`; None
    where none is, or there is only one set."""
    if metric is None or not isinstance(eval_dataset, dict):
        return None
    named = [name for name in eval_dataset if metric.removeprefix("eval_").startswith(f"{name}_")]
    return max(named, key=len, default=None)


def _has_labels(rows: Any, label_names: Sequence[str], batches: Callable[[Any], Iterable[Mapping[str, Any]]]) -> bool:
    columns = getattr(rows, "column_names", None)
    if columns is None and not isinstance(rows, IterableDataset) and len(rows) and isinstance(rows[0], Mapping):
        columns = rows[0].keys()
    if columns is not None and {*LABELS, *label_names} & set(columns):
        return True
    with torch.random.fork_rng(devices=[]):  # a collator may make labels of any column: look at a batch
        batch = next(iter(batches(rows)), {})
    return bool(label_names) and all(batch.get(name) is not None for name in label_names)


_REMEDY = "Train with a smaller learning rate or in float32, and look for rows of unusual length or values."


class TrainingStopped(ValueError):
    """A training has run into numbers that are not finite."""


def check_loss(loss: Tensor, step: int) -> None:
    """Refuses a loss that is not finite. Trainer would count it as zero, and go on."""
    if not loss.isfinite():
        raise TrainingStopped(f"training stopped: the loss of step {step} is {loss.item()}. {_REMEDY}")


def check_parameters(model: nn.Module, step: int) -> None:
    """Refuses a trained model with weights that are not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise TrainingStopped(f"training stopped: after step {step}, {name} is not finite. {_REMEDY}")
