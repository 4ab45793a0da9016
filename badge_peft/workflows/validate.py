"""Whether all that was asked for can be done: before any time is spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from badge_peft.early_exit.config import POLICIES, check_policy_name
from badge_peft.evaluation.confidence import rows_to_certify
from badge_peft.model_card import read_card
from badge_peft.training.arguments import from_json
from badge_peft.training.objectives import make_objective
from badge_peft.tuner.architectures import block_names, get_layout
from badge_peft.tuner.config import PROBLEM_TYPES
from badge_peft.tuner.losses import check_weights
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_choice
from badge_peft.utils.extras import require
from badge_peft.workflows.base_model import Base, badge_config, parse_blocks
from badge_peft.workflows.settings import SEARCH_GOALS, SEARCH_PICTURE, STUDY, TrainColumns, TrainSettings

TASKS = ("classification", "ranking")
_OF_RANKING: dict[str, tuple[Any, ...]] = {
    "backbone": ("frozen",),
    "final_exit": (None, "base_head"),
    "objective": ("joint",),
    "distillation": (None, 1),
    **dict.fromkeys(("learn_to_exit", "trials"), (False,)),
    **dict.fromkeys(("exit_weights", "metric", "problem_type"), (None,)),
}


def check_settings(settings: TrainSettings) -> TrainSettings:
    """The settings, those of exits that rank with their form; refuses, before anything is read, what cannot be."""
    ranks = settings.task == "ranking"
    settings = _for_ranking(settings) if ranks else settings
    exits = settings.exits
    training = settings.training
    make_objective(training.objective, training.depth, distillation=training.distillation or 0.0)
    policy = settings.goal.policy
    check_policy_name(policy, "auto")
    kind = POLICIES.get(policy)
    check_choice("task", settings.task, TASKS)
    if kind is not None and kind.by_group and not ranks:
        raise ValueError(
            f"policy={policy!r} ranks the candidates of a query, and this task has none: use policy='auto'."
        )
    if kind is not None and kind.reads_uncertainty and not exits.learn_to_exit:
        raise ValueError(f"policy={policy!r} needs learn_to_exit: a layer that learns when an exit is wrong.")
    if settings.problem_type is not None:
        check_choice("problem_type", settings.problem_type, PROBLEM_TYPES)
    if not ranks:
        settings.goal.arguments()
    _check_corpus(settings.columns, ranks)
    if training.depth is not None and training.objective != "single_exit":
        raise ValueError(
            f"depth={training.depth} is the exit of objective='single_exit', and objective={training.objective!r} "
            "trains them all: leave one of them out."
        )
    if training.objective == "two_stage" and exits.backbone == "frozen" and exits.keep_head:
        raise ValueError(
            "objective='two_stage' first trains the backbone and the final exit, and backbone='frozen' with "
            "keep_head leaves both as they are: use objective='joint'."
        )
    if exits.keep_head and exits.final_exit == "exit":
        raise ValueError("final_exit='exit' puts an exit in the place of the model's head: leave out keep_head.")
    badge_config(exits)
    if training.exit_weights is not None:
        check_weights(from_json(training.exit_weights))
    if settings.search.trials:
        _check_search(settings)
    size = distributed.rank_world()[1]
    if training.batch_size % size:
        raise ValueError(
            f"batch_size={training.batch_size} is not allowed with {size} processes, which share each batch evenly: "
            f"it must be a multiple of {size}."
        )
    return settings


def _for_ranking(settings: TrainSettings) -> TrainSettings:
    """The settings with the form of exits that rank; refuses what these cannot have."""
    exits = replace(settings.exits, keep_head=True, carry=settings.exits.carry or "none")
    exits = replace(exits, exit_type=exits.exit_type or "linear", exit_pooling=exits.exit_pooling or "auto")
    given = settings.to_dict()
    for name, allowed in _OF_RANKING.items():
        if given[name] not in allowed:
            raise ValueError(
                f"{name}={given[name]!r} is not for ranking, whose exits learn the scores of the model as it is, and "
                "are measured by the top k that they keep: leave it out."
            )
    if exits.exit_type == "past_future":
        raise ValueError(
            "exit_type='past_future' is not allowed for ranking: it puts an exit in the place of the model's own head."
        )
    settings.goal.ranking_arguments()
    return replace(settings, exits=exits)


def _check_corpus(columns: TrainColumns, ranks: bool) -> None:
    if columns.corpus is None:
        given = next((name for name in ("corpus_column", "candidates") if getattr(columns, name) is not None), None)
        if given is not None:
            raise ValueError(f"{given} says how candidates are found in a corpus: name its file with corpus.")
        return
    if not ranks:
        raise ValueError("corpus is for ranking: name the task with --task ranking.")
    require("ranking", "bm25s")


def _check_search(settings: TrainSettings) -> None:
    require("train", "optuna")
    check_choice("for", settings.search.search_for, SEARCH_GOALS)
    if settings.exits.backbone != "frozen":
        raise ValueError(
            f"trials={settings.search.trials} is not allowed with backbone={settings.exits.backbone!r}: all trials "
            "train on the same states, which takes a frozen backbone."
        )
    if settings.training.no_cache_states:
        raise ValueError(
            f"trials={settings.search.trials} is not allowed with no_cache_states: all trials train on the same "
            "states. Leave one of them out."
        )
    if settings.search.search_for == "speed" and settings.goal.target_blocks_saved is not None:
        raise ValueError(
            "for='speed' looks for the most blocks saved within max_score_drop, and target_blocks_saved says how "
            "many: leave one of them out."
        )
    if distributed.rank_world()[1] > 1:
        raise ValueError(f"trials={settings.search.trials} is for one process: search first, with 1.")


def check_training(settings: TrainSettings, base: Base, labeled: bool, eval_rows: int) -> bool:
    """Whether the exits learn from labels (else from the model's own answers), of training rows that may be `labeled`
    and this number of evaluation rows."""
    exits = settings.exits
    training = settings.training
    labels = base.labels
    learns_labels = labeled and training.distillation != 1
    if not learns_labels:
        if not base.has_head or exits.backbone != "frozen" or not exits.keep_head:
            raise ValueError(
                "without labels the exits learn from the model's own answers, which must not change meanwhile: that "
                "takes a fine-tuned model, --backbone frozen and --keep-head. Otherwise name the labels' column with "
                "--label-column."
            )
        needs = {"objective": ("joint",), "distillation": (None, 1), "learn_to_exit": (False,)}
        given = settings.to_dict()
        wrong = next((name for name, allowed in needs.items() if given[name] not in allowed), None)
        if wrong is not None:
            raise ValueError(
                f"{wrong}={given[wrong]!r} needs labels; without them the exits follow the model's own answers alone: "
                "leave it out."
            )
    policy = POLICIES.get(settings.goal.policy)
    blocks_saved = settings.goal.target_blocks_saved
    if policy is not None and not policy.suits(labels.problem_type):
        able = ", ".join(name for name, other in POLICIES.items() if other.suits(labels.problem_type))
        raise ValueError(
            f"policy={settings.goal.policy!r} is not allowed for {labels.problem_type}, which has no probabilities: "
            f"it must be one of {able}."
        )
    if blocks_saved is not None:
        blocks = len(block_names(base.model, get_layout(base.model)))
        first = min(parse_blocks(exits.exit_layers, blocks) or [1])
        if blocks_saved > 1 - first / blocks:
            raise ValueError(
                f"target_blocks_saved={blocks_saved} cannot be reached: the first exit is at block {first} of "
                f"{blocks}, so at most {1 - first / blocks:.3f} of the blocks are saved. Ask for less, or give "
                "earlier exits with exit_layers."
            )
    metric = labels.metric(settings.metric)
    goal = settings.goal.arguments()
    drop = goal["max_score_drop"]
    confidence = goal["confidence"]
    if confidence is not None:
        needed = rows_to_certify(drop, confidence, metric, labels.problem_type)
        if eval_rows < needed:
            raise ValueError(
                f"there are {eval_rows} evaluation rows, and a drop of at most {drop} with confidence {confidence} "
                f"takes at least {needed}: give more, or allow a larger drop."
            )
    return learns_labels


def with_output_dir(settings: TrainSettings, model: str) -> TrainSettings:
    """The settings with the folder that the adapter goes to: the model's name and `-exits`, where none is named."""
    name = Path(model).resolve().name if Path(model).exists() else Path(model).name
    out = settings.output_dir or Path(f"{name}-exits")
    if out.is_file():
        raise ValueError(f"output_dir={str(out)!r} is a file: name a folder.")
    if (out / "config.json").exists():
        raise ValueError(f"output_dir={str(out)!r} holds a model: an adapter needs its own folder.")
    searched = (STUDY, SEARCH_PICTURE) if settings.search.trials else ()  # a search that goes on
    if out.is_dir() and any(file.name not in searched for file in out.iterdir()) and not settings.overwrite:
        raise ValueError(f"output_dir={str(out)!r} is not empty: name another, or overwrite it with --overwrite.")
    read_card(out)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={str(out)!r} cannot be written: {error}. Name another folder.") from error
    return replace(settings, output_dir=out)
