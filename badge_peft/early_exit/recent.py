"""Policies of the last few configs: a service that asks for the same one at each call need not build it anew."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import ExitPolicy, build_policy

_KEPT = 8


class _Entry(NamedTuple):
    types: list[type]
    fields: dict[str, Any]  # a copy, as configs and what they hold may be changed at any time
    policy: ExitPolicy


_entries: tuple[_Entry, ...] = ()  # replaced whole, never changed: threads need no lock


def policy_for(config: Any, overrides: dict[str, Any]) -> ExitPolicy:
    """The policy of `EarlyExitConfig.of(config, **overrides)`. It is shared: leave its config alone.

    Two configs are the same when all fields are equal and of one type (`True` is 1, but no patience).
    """
    global _entries
    if isinstance(config, EarlyExitConfig):
        fields = {**vars(config), **overrides}
    elif config is None:
        fields = overrides
    elif isinstance(config, dict):
        fields = {**config, **overrides}
    else:
        return build_policy(config, **overrides)  # which refuses it
    types = list(map(type, fields.values()))
    for entry in _entries:
        if entry.fields == fields and entry.types == types:
            return entry.policy
    policy = build_policy(EarlyExitConfig.of(config, **overrides))
    _entries = (_Entry(types, copy.deepcopy(fields), policy), *_entries[: _KEPT - 1])
    return policy
