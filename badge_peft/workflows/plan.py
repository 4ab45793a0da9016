"""Which rows train and which calibrate, and whether all that was asked for can be done: before any time is spent."""

from __future__ import annotations

import random
from typing import Any

from badge_peft.evaluation.guarantee import rows_needed
from badge_peft.utils import distributed
from badge_peft.workflows.base import Base
from badge_peft.workflows.measure import check_metric, default_metric
from badge_peft.workflows.rows import TextRows, hold_out, read_rows, without
from badge_peft.workflows.settings import TrainSettings


def read_splits(settings: TrainSettings) -> tuple[TextRows, TextRows]:
    """Training rows and evaluation rows, with no text in both.

    Raises:
        OSError: no such data.
        ValueError: a column or split that is not there, or too few rows.
    """
    columns: dict[str, Any] = {
        "text_column": settings.text_column,
        "text_pair_column": settings.text_pair_column,
        "label_column": settings.label_column,
        "unlabelled": settings.unlabelled,
        "dataset_config": settings.dataset_config,
    }
    rows = read_rows(settings.data, split=settings.split, training=True, **columns)
    if settings.max_rows is not None and len(rows) > settings.max_rows:
        rows = rows.select(random.Random(settings.seed).sample(range(len(rows)), settings.max_rows))
    if settings.eval_data is None and settings.eval_split is None:
        return hold_out(rows, settings.eval_share, settings.seed)
    source = settings.eval_data or settings.data
    held = read_rows(source, split=settings.eval_split, **columns)
    rows = without(rows, held)
    if not len(rows):
        raise ValueError(f"every text of {settings.data} is among the evaluation texts too: nothing is left to train.")
    return rows, held


def check_plan(
    settings: TrainSettings,
    base: Base,
    targets: list[Any] | None,
    held_targets: list[Any] | None,
    held: TextRows,
) -> bool:
    """Whether the exits learn from labels (else from the model's own answers).

    Args:
        settings: What is asked for.
        base: The model.
        targets: Of the training rows.
        held_targets: Of the evaluation rows.
        held: The evaluation rows.

    Raises:
        ValueError: labels are needed and missing, or there are too few rows for the confidence asked for, or the
            processes cannot share a batch evenly.
    """
    size = distributed.together()[1]
    if settings.batch_size % size:
        raise ValueError(
            f"batch_size={settings.batch_size} is not allowed with {size} processes, which share each batch evenly: "
            f"it must be a multiple of {size}."
        )
    labels = base.labels
    distilled = settings.distillation == 1
    learns_labels = targets is not None and any(t is not None for t in targets) and not distilled
    if not learns_labels:
        if not base.has_head or settings.backbone != "frozen" or not settings.keep_head:
            raise ValueError(
                "without labels the exits learn from the model's own answers, which must not change meanwhile: that "
                "takes a fine-tuned model, --backbone frozen and --keep-head. Otherwise name the labels' column with "
                "--label-column."
            )
        if settings.objective != "joint":
            raise ValueError(f"objective={settings.objective!r} needs labels; without them it is 'joint'.")
        if (settings.badge or {}).get("learn_to_exit"):
            raise ValueError("learn_to_exit needs labels: it learns when an exit is wrong.")
    problem_type, count = labels.problem_type, len(labels.names)
    check_metric(settings.metric, problem_type, count)
    if settings.confidence is not None:
        metric = settings.metric or default_metric(problem_type)
        if settings.max_score_drop is None or metric != "accuracy" or problem_type != "single_label_classification":
            raise ValueError("confidence needs max_score_drop, metric='accuracy' and one label per row.")
        rows = len(held) if held_targets is None else sum(t is not None for t in held_targets)
        needed = 2 * rows_needed(settings.max_score_drop, settings.confidence)
        if rows < needed:
            raise ValueError(
                f"there are {rows} evaluation rows, and a drop of at most {settings.max_score_drop} with confidence "
                f"{settings.confidence} takes at least {needed}: give more, or allow a larger drop."
            )
    return learns_labels
