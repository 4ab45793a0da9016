"""`tasks`: many tasks on every row, in one pass.

A frozen backbone and untouched states H_m mean that the blocks compute the same for every adapter: the rows travel
through them once, and each task has a reader of its own for all of them. A row goes as deep as its slowest task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from badge_peft.early_exit.adapter_names import check_frozen, check_known
from badge_peft.early_exit.calls import Question
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policy_reader import PolicyReader
from badge_peft.outputs import MultiTaskOutput
from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.saved_modules import TaskHeads


class Tasks:
    """The tasks of one call.

    Args:
        names: Adapters that `check_tasks` has let through.
        batch_size: B.
        config: How to stop, as for `config_of_each`.
        last_head: The module that gives the model's own logits; None where the model names none.
    """

    def __init__(self, names: Sequence[str], batch_size: int, config: Any, last_head: nn.Module | None) -> None:
        own = config_of_each(config, names)
        self.questions = [Question(name, 0, batch_size, own[name]) for name in names]
        self._last_head = last_head

    def sort(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As they are."""
        return inputs

    def heads(self, readers: Sequence[PolicyReader]) -> TaskHeads:
        """The model's own head, read for each task that still asks when the blocks are through."""
        asking = [reader for reader in readers if not reader.exits.has_final_exit]
        return TaskHeads({reader.exits.adapter: partial(_asks, reader) for reader in asking}, self._last_head)

    def output(self, readers: Sequence[PolicyReader]) -> MultiTaskOutput:
        """The answers, from the reader of each task."""
        answers = {reader.exits.adapter: reader.output() for reader in readers}
        exits: list[Any] = [output.exit_layer for output in answers.values()]
        return MultiTaskOutput(answers, torch.stack(exits).amax(dim=0))


def _asks(reader: PolicyReader) -> bool:
    return reader.num_active > 0


def check_tasks(
    tasks: Sequence[str],
    model: nn.Module,
    layout: BlockLayout,
    configs: dict[str, BadgeConfig],
    active: Sequence[str],
) -> None:
    """Refuses tasks that cannot share a pass.

    Args:
        tasks: Names of adapters.
        model: The base model.
        layout: Where its parts are.
        configs: Of all adapters.
        active: Names of the active adapters, which every row passes through.

    Raises:
        ValueError: no names, the same one twice, an unknown one, or an adapter that changes what the blocks compute.
    """
    names = [] if isinstance(tasks, str) else list(tasks)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"tasks must be a list with the names of adapters, got {tasks!r}: the model has "
            f"{', '.join(map(repr, configs))}."
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"tasks has {twice[0]!r} more than once: name each adapter once, it answers every row.")
    check_known(names, configs)
    check_frozen("tasks", names, model, layout, configs, active)


def config_of_each(given: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """The early-exit config of each task, as the call has it; None: the adapter's own.

    Args:
        given: A config (or a dict of its fields) for all of them, or a dict from tasks to such configs, in which a
            task that is left out keeps its own.
        tasks: Names.

    Raises:
        ValueError: the dict names a task that the call does not have.
    """
    if not isinstance(given, Mapping) or not given or not all(_is_config(value) for value in given.values()):
        return dict.fromkeys(tasks, given)
    fields = EarlyExitConfig.__dataclass_fields__
    unknown = [name for name in given if name not in tasks]
    if unknown and not all(name in fields for name in given):
        raise ValueError(
            f"early_exit_config has {unknown[0]!r}, which is no task of this call; they are "
            f"{', '.join(map(repr, tasks))}."
        )
    return dict.fromkeys(tasks, given) if unknown else {name: given.get(name) for name in tasks}


def _is_config(value: Any) -> bool:
    return value is None or isinstance(value, (dict, EarlyExitConfig))
