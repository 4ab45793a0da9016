"""From the arguments of a call of `early_exit_forward` to who answers: the adapters it asks, and a reader for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from badge_peft.early_exit.adapter_names import BASE, RowOrder, check_adapter_names
from badge_peft.early_exit.calls import Call, Question, RowFacts
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policy_reader import PolicyReader
from badge_peft.early_exit.tasks import Tasks, check_tasks
from badge_peft.early_exit.token_reader import TokenReader
from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.config import BadgeConfig, exit_numbers
from badge_peft.tuner.exits import AdapterExits
from badge_peft.tuner.pooling import TOKENS
from badge_peft.tuner.prepare import classifies_tokens
from badge_peft.utils.problem import Problem


def call_of_several(
    batch_size: int,
    adapter_names: Sequence[str] | None,
    tasks: Sequence[str] | None,
    config: Any,
    model: nn.Module,
    layout: BlockLayout,
    configs: dict[str, BadgeConfig],
    active: Sequence[str],
) -> Call:
    """The call that asks the adapters of `adapter_names` or `tasks`.

    Args:
        batch_size: B.
        adapter_names: One for each row, or None.
        tasks: Those that answer every row, or None.
        config: How to stop, as the call has it.
        model: The base model.
        layout: Where its parts are.
        configs: Of all adapters.
        active: Names of the active adapters.

    Raises:
        ValueError: both are given, or they do not fit the rows or the model.
    """
    if tasks is None:
        names: Any = adapter_names
        check_adapter_names(names, batch_size, model, layout, configs, active)
        return RowOrder(names, config)
    if adapter_names is not None:
        raise ValueError("adapter_names has one adapter for each row, tasks has them all for every row: give one.")
    check_tasks(tasks, model, layout, configs, active)
    return Tasks(tasks, batch_size, config, getattr(model, layout.head[-1], None) if layout.head else None)


def reader_of(
    asked: Question,
    about: RowFacts,
    exits: AdapterExits,
    config: Any,
    overrides: dict[str, Any],
) -> PolicyReader:
    """Who answers a question to an adapter.

    Args:
        asked: The question.
        about: All rows of the call.
        exits: Of the adapter.
        config: How the adapter itself stops.
        overrides: Fields of `EarlyExitConfig` that the call gives.

    Raises:
        ValueError: the policy cannot be built of these fields.
    """
    first, rows = asked.first, asked.rows
    own = about.part(first, rows)
    policy = build_policy(config if asked.config is None else asked.config, **overrides)
    if exits.reads_tokens:
        return TokenReader(exits, rows, own.mask, first, policy, own.length, own.special)
    groups = None if own.groups is None else own.groups.numpy()
    mask = own.ends if exits.pooling == "last" else own.mask
    return PolicyReader(exits, rows, mask, first, policy, groups)


def check_fits(rule: EarlyExitConfig | None, config: BadgeConfig, num_blocks: int) -> None:
    """Refuses a rule that the exits of an adapter cannot follow, where it is stored and not by the first call.

    Args:
        rule: How the adapter is to stop; None is the default, which always fits.
        config: Of the adapter, prepared for its model.
        num_blocks: M.

    Raises:
        ValueError: `rule` does not fit; the message says what to do.
    """
    if rule is not None:
        policy = build_policy(rule)
        policy.check(exit_numbers(config, num_blocks), config.resolved_labels, config.resolved_problem_type)
        policy.check_learned(config.learn_to_exit)


def base_reader(asked: Question, about: RowFacts, num_blocks: int, model: Any) -> PolicyReader:
    """Who answers rows without an adapter: the base model, at full depth."""
    pooling = TOKENS if classifies_tokens(model) else "cls"
    exits = AdapterExits(BASE, [num_blocks], pooling, model.config.num_labels, Problem.name, False)
    return reader_of(replace(asked, config={"policy": "never"}), about, exits, None, {})
