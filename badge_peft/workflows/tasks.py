"""Many tasks on the same texts: several adapters on one model, as the commands see them with `--task`."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from badge_peft.bundle import find_tasks
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation.collate import pad_features
from badge_peft.evaluation.words import Words, tokenize_words
from badge_peft.hub import has_tokenizer, load_pretrained
from badge_peft.model import get_badge_model
from badge_peft.outputs import MultiTaskOutput
from badge_peft.utils.logs import quiet
from badge_peft.utils.problem import problem_of
from badge_peft.utils.texts import length_limit
from badge_peft.workflows.adapter_dir import Adapter, check_adapter, choose_device, recorded_columns
from badge_peft.workflows.encode import encode_texts, load_tokenizer
from badge_peft.workflows.evaluate import evaluate_adapter
from badge_peft.workflows.kinds import check_one_text
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.predict import Pair, answer_in_turn, tagged
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.sources import read_source


@dataclass
class TaskStack:
    """Loaded adapters of many tasks.

    Args:
        adapters: By task, all with the same model and tokenizer.
    """

    adapters: dict[str, Adapter]

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return list(self.adapters)

    @property
    def shared(self) -> Adapter:
        """Any of them: what all share is in it."""
        return self.adapters[self.names[0]]

    def use(self, task: str) -> Adapter:
        """The adapter of a task, which becomes the active one."""
        adapter = self.adapters[task]
        adapter.model.set_adapter(task, inference_mode=True)
        return adapter

    def early_exit_configs(self, **overrides: Any) -> dict[str, EarlyExitConfig]:
        """How each task stops; `overrides` are as for `Adapter.early_exit_config`, and hold for all tasks whose policy
        reads them.

        Raises:
            ValueError: as there, where no task reads one.
        """
        unread = {task: set(self.use(task).unread(**overrides)) for task in self.names}
        by_none = set.intersection(*unread.values())
        found = {}
        for task in self.names:
            read = {name: value for name, value in overrides.items() if name not in unread[task] - by_none}
            found[task] = self.use(task).early_exit_config(**read)
        return found

    def answer(self, batch: dict[str, torch.Tensor], configs: dict[str, EarlyExitConfig]) -> MultiTaskOutput:
        """The answers of a padded batch, from one pass."""
        batch = {name: value.to(self.shared.device) for name, value in batch.items()}
        return early_exit_forward(self.shared.model, tasks=self.names, early_exit_config=configs, **batch)


def is_named(value: str) -> bool:
    """Whether it is NAME=ADAPTER, and not a place whose path has an equals sign in it."""
    return "=" in value and "/" not in value.partition("=")[0] and not Path(value).exists()


def parse_tasks(values: Sequence[str]) -> dict[str, str]:
    """`["intent=DIR", "pii=user/repo"]` as a dict.

    Raises:
        ValueError: an entry is not like that, or a task comes twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, place = value.partition("=")
        if not (name and equals and place):
            raise ValueError(f"--task {value} is not allowed: it must be NAME=ADAPTER, a folder or a repository.")
        if name in found:
            raise ValueError(f"--task has {name!r} more than once: name each task once.")
        found[name] = place
    return found


def tasks_of(values: Sequence[str], adapter: str | None) -> dict[str, str] | None:
    """The tasks that a command is given, with `--task` or as a bundle's folder; None: it is given one adapter."""
    if values:
        return parse_tasks(values)
    return None if adapter is None else find_tasks(adapter)


def open_tasks(tasks: Mapping[str, str], base_model: str | None = None, device: str | None = None) -> TaskStack:
    """Loads the adapters of many tasks on one base model.

    Args:
        tasks: Names, with folders or repositories.
        base_model: Folder or repository of the base model; None takes what the adapters name.
        device: As for `open_adapter`.

    Raises:
        OSError: there is no such adapter or base model.
        ValueError: tasks that cannot share a pass, or no tokenizer.
    """
    for place in tasks.values():
        check_adapter(place)
    where = choose_device(device)
    with quiet():
        model = load_pretrained(tasks, base_model=base_model).to(where)
    badge = get_badge_model(model)
    named = next((place for place in tasks.values() if has_tokenizer(place)), None)
    tokenizer = load_tokenizer(
        str(named or base_model or badge.config_of().base_model_name_or_path), model.get_base_model()
    )
    labels = {task: LabelSet(badge.label_names(task), badge.config_of(task).resolved_problem_type) for task in tasks}
    kinds = {task: "tokens" if badge.config_of(task).reads_tokens else "classification" for task in tasks}
    columns = {task: badge.config_of(task).data_columns or recorded_columns(place) for task, place in tasks.items()}
    return TaskStack({task: Adapter(model, tokenizer, labels[task], columns[task], kinds[task]) for task in tasks})


def predict_tasks(
    stack: TaskStack, texts: Iterable[Pair], configs: dict[str, EarlyExitConfig], batch_size: int = 32
) -> Generator[dict[str, Any], None, None]:
    """As `predict`, for many tasks in one pass.

    Returns:
        One dict per text: `text` (and `text_pair`), `tasks`, with what `predict` says of each, and `blocks`, the
        deepest block that the text went through.
    """
    return answer_in_turn(texts, batch_size, partial(_answer, stack, configs))


def _answer(stack: TaskStack, configs: dict[str, EarlyExitConfig], texts: list[Pair]) -> list[dict[str, Any]]:
    batch, words = batch_of(stack, [text for text, _ in texts], [pair for _, pair in texts])
    output = stack.answer(batch, configs)
    found: list[dict[str, Any]] = [
        {"text": text, **({} if pair is None else {"text_pair": pair}), "tasks": {}} for text, pair in texts
    ]
    for task, own in output.items():
        assert own.logits is not None and own.exit_layer is not None
        labels = stack.adapters[task].labels
        if stack.adapters[task].tags is not None:
            assert words is not None
            entities = tagged(texts, words, own, labels.names)
            for line, answer, number in zip(found, entities, own.exit_layer.tolist(), strict=True):
                line["tasks"][task] = {"entities": answer["entities"], "exit": number}
            continue
        problem = problem_of(labels.problem_type)
        rows = zip(found, own.logits.float().cpu().numpy(), own.exit_layer.tolist(), strict=True)
        for line, logits, number in rows:
            line["tasks"][task] = {**problem.format_prediction(logits, labels.names), "exit": number}
    return [{**line, "blocks": blocks} for line, blocks in zip(found, output.blocks_run.tolist(), strict=True)]


def evaluate_tasks(
    stack: TaskStack, data: str, columns: Columns = Columns(), metric: str | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Scores every task, and counts the blocks that one pass for all of them runs.

    Args:
        stack: From `open_tasks`.
        data: As for `read_examples`. Labels of a task are in the column of its name; a task without one is scored
            against its own full depth.
        columns: Without a label column.
        metric: Of all tasks; None is that of each problem type.
        batch_size: Rows per pass.

    Returns:
        `tasks`, with the report of `evaluate_adapter` for each, and of one pass `mean_blocks`, and `blocks_saved`, the
        share of the blocks of a full pass for each task.

    Raises:
        ValueError: a label column is named.
    """
    if columns.label_column is not None:
        raise ValueError(
            f"label_column={columns.label_column!r} is not allowed with several tasks: the labels of a task are in "
            "the column of its name."
        )
    reports = {}
    for task in stack.names:
        adapter = stack.use(task)
        examples = adapter.read(data, labels_of(task, data, columns))
        reports[task] = evaluate_adapter(adapter, examples, metric, batch_size)[0]
    texts = stack.shared.read(data, replace(columns, unlabeled=True))
    configs, blocks = stack.early_exit_configs(), []
    for start in range(0, len(texts), batch_size):
        rows = texts.select(range(start, min(len(texts), start + batch_size)))
        blocks += stack.answer(batch_of(stack, rows.words or rows.texts, rows.pairs)[0], configs).blocks_run.tolist()
    depth = get_badge_model(stack.shared.model).num_blocks
    mean = sum(blocks) / len(blocks)
    return {
        "rows": len(blocks),
        "num_blocks": depth,
        "mean_blocks": mean,
        "blocks_saved": 1 - mean / (depth * len(reports)),
        "split": texts.split,
        "tasks": reports,
    }


def labels_of(task: str, data: str, columns: Columns) -> Columns:
    """Which columns are read for a task: its labels are in the column of its name, where there is one."""
    splits = read_source(data, columns.dataset_config)
    named = any(task in split.features for split in splits.values())
    if named and not columns.unlabeled:
        return replace(columns, label_column=task)
    return replace(columns, unlabeled=True)


def batch_of(
    stack: TaskStack, texts: list[Any], pairs: Sequence[str | None] | None
) -> tuple[dict[str, torch.Tensor], list[Words] | None]:
    """Texts as a padded batch, and the words of each, where a task labels tokens."""
    base = stack.shared.model.get_base_model()
    if any(adapter.tags is not None for adapter in stack.adapters.values()):
        check_one_text(pairs)
        own, words = tokenize_words(texts, stack.shared.tokenizer, length_limit(stack.shared.tokenizer))
        return pad_features(own, base, tokens=True), words
    second = [pair for pair in pairs or [] if pair is not None]
    encoded = encode_texts(texts, second or None, stack.shared.tokenizer)
    rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]
    return pad_features(rows, base), None
