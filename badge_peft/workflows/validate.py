"""Whether all that was asked for can be done: before any time is spent."""

from __future__ import annotations

from typing import Any

from badge_peft.early_exit.registry import check_policy_name
from badge_peft.evaluation.calibration import rows_needed
from badge_peft.evaluation.metrics import METRICS
from badge_peft.training.objectives import OBJECTIVES
from badge_peft.tuner.config import PROBLEM_TYPES
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_choice
from badge_peft.workflows.base_model import Base, badge_config
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import check_metric, default_metric
from badge_peft.workflows.settings import TrainSettings


def check_settings(settings: TrainSettings) -> None:
    """Refuses what no model and no data could make right, before anything is read.

    Raises:
        ValueError: a value that is not allowed, or two that exclude one another.
    """
    exits, training = settings.exits, settings.training
    check_choice("objective", training.objective, OBJECTIVES)
    check_policy_name(settings.goal.policy, "auto")
    if settings.metric is not None:
        check_choice("metric", settings.metric, tuple(METRICS))
    if settings.problem_type is not None:
        check_choice("problem_type", settings.problem_type, PROBLEM_TYPES)
    settings.goal.arguments()
    if training.objective == "two_stage" and exits.backbone == "frozen" and exits.keep_head:
        raise ValueError(
            "objective='two_stage' first trains the backbone and the final exit, and backbone='frozen' with "
            "keep_head leaves both as they are: use objective='joint'."
        )
    if exits.keep_head and exits.final_exit == "exit":
        raise ValueError("final_exit='exit' puts an exit in the place of the model's head: leave out keep_head.")
    badge_config(exits, exits.final_exit or "base_head")


def check_training(
    settings: TrainSettings,
    base: Base,
    targets: list[Any] | None,
    eval_targets: list[Any] | None,
    eval_examples: TextDataset,
) -> bool:
    """Whether the exits learn from labels (else from the model's own answers).

    Args:
        settings: What is asked for.
        base: The model.
        targets: Of the training rows.
        eval_targets: Of the evaluation rows.
        eval_examples: The evaluation rows.

    Raises:
        ValueError: labels are needed and missing, or there are too few rows for the confidence asked for, or the
            processes cannot share a batch evenly.
    """
    size = distributed.rank_world()[1]
    if settings.training.batch_size % size:
        raise ValueError(
            f"batch_size={settings.training.batch_size} is not allowed with {size} processes, which share each batch "
            f"evenly: it must be a multiple of {size}."
        )
    labels = base.labels
    distilled = settings.training.distillation == 1
    learns_labels = targets is not None and any(t is not None for t in targets) and not distilled
    if not learns_labels:
        if not base.has_head or settings.exits.backbone != "frozen" or not settings.exits.keep_head:
            raise ValueError(
                "without labels the exits learn from the model's own answers, which must not change meanwhile: that "
                "takes a fine-tuned model, --backbone frozen and --keep-head. Otherwise name the labels' column with "
                "--label-column."
            )
        if settings.training.objective != "joint":
            raise ValueError(f"objective={settings.training.objective!r} needs labels; without them it is 'joint'.")
        if settings.exits.learn_to_exit:
            raise ValueError("learn_to_exit needs labels: it learns when an exit is wrong.")
    problem_type, count = labels.problem_type, len(labels.names)
    check_metric(settings.metric, problem_type, count)
    goal = settings.goal.arguments()
    if "confidence" in goal:
        metric = settings.metric or default_metric(problem_type)
        if "max_score_drop" not in goal or metric != "accuracy" or problem_type != "single_label_classification":
            raise ValueError("confidence needs max_score_drop, metric='accuracy' and one label per row.")
        rows = len(eval_examples) if eval_targets is None else sum(t is not None for t in eval_targets)
        needed = 2 * rows_needed(goal["max_score_drop"], goal["confidence"])
        if rows < needed:
            raise ValueError(
                f"there are {rows} evaluation rows, and a drop of at most {goal['max_score_drop']} with confidence "
                f"{goal['confidence']} takes at least {needed}: give more, or allow a larger drop."
            )
    return learns_labels
