"""Many tasks on the same texts: several adapters on one model, as the commands see them with `--task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from badge_peft.bundle import find_tasks
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation.collate import pad_features
from badge_peft.evaluation.words import Words, tokenize_words
from badge_peft.model import get_badge_model
from badge_peft.utils.texts import length_limit
from badge_peft.workflows.adapter_dir import Adapter, open_adapters
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import encode_texts
from badge_peft.workflows.evaluate import evaluate_adapter
from badge_peft.workflows.kinds import check_one_text
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
        reads them."""
        unread = {task: set(self.use(task).unread(**overrides)) for task in self.names}
        by_none = set.intersection(*unread.values())
        found = {}
        for task in self.names:
            read = {name: value for name, value in overrides.items() if name not in unread[task] - by_none}
            found[task] = self.use(task).early_exit_config(**read)
        return found


def is_named(value: str) -> bool:
    """Whether it is NAME=ADAPTER, and not a place whose path has an equals sign in it."""
    return "=" in value and "/" not in value.partition("=")[0] and not Path(value).exists()


def parse_tasks(values: Sequence[str]) -> dict[str, str]:
    """`["intent=DIR", "pii=user/repo"]` as a dict."""
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
    """Loads the adapters of many tasks on one base model."""
    return TaskStack(open_adapters(tasks, tasks, base_model, device))


def evaluate_tasks(
    stack: TaskStack, data: str, columns: Columns = Columns(), metric: str | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Scores every task, and counts the blocks that one pass for all of them runs."""
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
    configs, pairs, blocks = stack.early_exit_configs(), pairs_of(texts), []
    for start in range(0, len(pairs), batch_size):
        batch, _ = batch_of([*stack.adapters.values()], pairs[start : start + batch_size])
        output = early_exit_forward(stack.shared.model, tasks=stack.names, early_exit_config=configs, **batch)
        blocks += output.blocks_run.tolist()
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
    adapters: Sequence[Adapter], texts: Sequence[Sequence[Any]]
) -> tuple[dict[str, torch.Tensor], list[Words] | None]:
    """Texts with their second text, or None, as a padded batch of adapters that share a model, and the words of each
    where one labels tokens."""
    first, seconds = adapters[0], [text[1] for text in texts if text[1] is not None]
    base, words = first.model.get_base_model(), None
    if any(adapter.tags is not None for adapter in adapters):
        check_one_text(seconds)
        rows, words = tokenize_words([text[0] for text in texts], first.tokenizer, length_limit(first.tokenizer))
    else:
        encoded = encode_texts([text[0] for text in texts], seconds or None, first.tokenizer)
        rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    batch = pad_features(rows, base, tokens=words is not None)
    return {name: value.to(first.device) for name, value in batch.items()}, words


def pairs_of(rows: TextDataset) -> list[tuple[Any, str | None]]:
    """What `batch_of` takes."""
    seconds: Sequence[str | None] = rows.pairs or [None] * len(rows)
    return [*zip(rows.words or rows.texts, seconds, strict=True)]
