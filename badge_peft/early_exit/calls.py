"""Which adapters a call of `early_exit_forward` asks about which rows, checked first, and what it returns.

A frozen backbone and untouched states H_m mean that the blocks compute the same for every adapter. So rows of several
adapters travel through them side by side (`adapter_names`), or every row is read by several (`tasks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from badge_peft.early_exit.arguments import input_size
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.readers import PolicyReader
from badge_peft.outputs import EarlyExitOutput, MultiTaskOutput
from badge_peft.tuner.architectures import BlockLayout, base_name
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.decoders import read_mask
from badge_peft.tuner.prepare import NO_HEAD, classifies_tokens
from badge_peft.tuner.saved_modules import RowHeads, TaskHeads

#: PEFT's name for rows without an adapter: the base model answers them, at full depth.
BASE = "__base__"
#: Inputs of a model whose first dimension is never the batch.
_SHARED = frozenset(("head_mask", "cache_position"))


@dataclass(frozen=True)
class AdapterRequest:
    """What a call asks of one adapter: about `rows` of its rows from `first` on, which lie side by side; `config` is
    how to stop, as the call has it (None: as the adapter does)."""

    adapter: str
    first: int
    rows: int
    config: Any


@dataclass(frozen=True)
class BatchInfo:
    """What a call knows of its rows, in the order of the pass."""

    rows: int  # B
    length: int  # S, with what compiled blocks pad
    mask: Tensor | None  # [B, S]; one of another first dimension holds for all rows
    ends: Tensor | None  # [B, S], whose last position that is not 0 is a row's last token; the mask but for decoders
    special: Tensor | None  # [B, S'], 1 for tokens that need no answer; S' without padding of compiled blocks
    groups: Any = None  # [B], a number for each row, the same for the candidates of a query

    @classmethod
    def of(cls, badge: Any, inputs: dict[str, Any], length: int, special: Any, groups: Any) -> BatchInfo:
        """Of the inputs of `badge`, whose rows had `length` positions before compiled blocks padded them."""
        rows, padded = input_size(**inputs)
        if special is None and padded > length:
            special = torch.zeros(rows, length, dtype=torch.long)
        ends = read_mask(badge.model, badge.layout, "last", inputs)
        codes = None if groups is None else groups.numpy()
        return cls(rows, padded, inputs.get("attention_mask"), ends, special, codes)

    def part(self, first: int, rows: int) -> BatchInfo:
        """The same of some rows, which lie side by side."""
        if rows == self.rows:
            return self
        own = slice(first, first + rows)
        mask, ends = (x[own] if x is not None and x.shape[0] == self.rows else x for x in (self.mask, self.ends))
        special, groups = (None if x is None else x[own] for x in (self.special, self.groups))
        return BatchInfo(rows, self.length, mask, ends, special, groups)


class Call:
    """One call, of one adapter for all rows."""

    def __init__(self, requests: list[AdapterRequest]) -> None:
        self.requests = requests

    def sort(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs with the rows of each adapter side by side."""
        return inputs

    def heads(self, readers: Sequence[PolicyReader]) -> Any:
        """Who answers at the model's own head; None: the active adapter."""
        return None

    def output(self, readers: Sequence[PolicyReader]) -> Any:
        """What the call returns, once every row has its answers."""
        return readers[0].output()


class MixedCall(Call):
    """A call of one adapter for each row: the rows of one are put side by side, and back again."""

    def __init__(self, adapter_names: Sequence[str], config: Any = None) -> None:
        names = list(dict.fromkeys(adapter_names))
        self._which = np.array([names.index(name) for name in adapter_names])
        self._order = torch.from_numpy(self._which.argsort(kind="stable"))
        counts: list[int] = np.bincount(self._which).tolist()
        super().__init__(
            [
                AdapterRequest(name, end - count, count, config)
                for name, count, end in zip(names, counts, accumulate(counts), strict=True)
            ]
        )

    def sort(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with their rows in the new order; what all rows share stays as it is."""
        rows = len(self._which)
        return {
            name: value.index_select(0, self._order.to(value.device))
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows and name not in _SHARED
            else value
            for name, value in inputs.items()
        }

    def heads(self, readers: Sequence[PolicyReader]) -> RowHeads:
        """Each row goes through the copy of its own adapter."""
        return RowHeads([(request.adapter, request.rows) for request in self.requests])

    def output(self, readers: Sequence[PolicyReader]) -> EarlyExitOutput:
        """The output of all rows as they came, from the reader of each adapter."""
        found = [reader.output() for reader in readers]
        answers: list[Any] = [output.logits for output in found]
        labels = [answer.shape[-1] for answer in answers]
        dtype = reduce(torch.promote_types, (answer.dtype for answer in answers))
        device = answers[0].device
        wide = [F.pad(x.to(device, dtype), (0, max(labels) - x.shape[-1]), value=-torch.inf) for x in answers]
        back = self._order.argsort().to(device)
        exits, non_finite = (
            torch.cat([output[name].to(device) for output in found])[back] for name in ("exit_layer", "non_finite")
        )
        tokens: Any = found[0].token_exit_layer  # such an adapter has all rows
        return EarlyExitOutput(
            logits=torch.cat(wide)[back],
            exit_layer=exits,
            non_finite=non_finite,
            token_exit_layer=None if tokens is None else tokens[back],
            num_labels=torch.tensor(labels)[torch.from_numpy(self._which)].to(device),
        )


class TaskCall(Call):
    """A call of several adapters for every row, which goes as deep as its slowest task."""

    def __init__(self, tasks: Sequence[str], batch_size: int, config: Any, last_head: nn.Module | None) -> None:
        own = config_of_each(config, tasks)
        super().__init__([AdapterRequest(task, 0, batch_size, own[task]) for task in tasks])
        self._last_head = last_head

    def heads(self, readers: Sequence[PolicyReader]) -> TaskHeads:
        """The model's own head, read for each task that still asks when the blocks are through."""
        asks = {r.exits.adapter: partial(getattr, r, "num_active") for r in readers if not r.exits.has_final_exit}
        return TaskHeads(asks, self._last_head)

    def output(self, readers: Sequence[PolicyReader]) -> MultiTaskOutput:
        """The answers, from the reader of each task."""
        answers = {reader.exits.adapter: reader.output() for reader in readers}
        exits: list[Any] = [output.exit_layer for output in answers.values()]
        return MultiTaskOutput(answers, torch.stack([x.to(exits[0].device) for x in exits]).amax(dim=0))


def plan_call(
    badge: Any, batch_size: int, adapter_names: Sequence[str] | None, tasks: Sequence[str] | None, config: Any
) -> Call:
    """The call that asks the active adapter of `badge`, a `BadgeModel`, or those that are named."""
    if tasks is None and adapter_names is None:
        return Call([AdapterRequest(badge.single_active_adapter(), 0, batch_size, config)])
    if tasks is None:
        check_adapter_names(badge, adapter_names, batch_size)
        return MixedCall(adapter_names or (), config)
    if adapter_names is not None:
        raise ValueError("adapter_names has one adapter for each row, tasks has them all for every row: give one.")
    check_tasks(badge, tasks)
    head = badge.layout.head
    return TaskCall(tasks, batch_size, config, getattr(badge.model, head[-1], None) if head else None)


def check_adapter_names(badge: Any, adapter_names: Any, batch_size: int) -> None:
    """Refuses, with a ValueError, rows that cannot share a pass."""
    model, layout, configs = badge.model, badge.layout, badge.peft_config
    named = not isinstance(adapter_names, str) and all(isinstance(name, str) for name in adapter_names)
    if not named or len(adapter_names) != batch_size:
        raise ValueError(
            f"adapter_names must give one name for each of the {batch_size} rows, got {adapter_names!r}: repeat the "
            "name of an adapter for each of its rows."
        )
    names = list(dict.fromkeys(adapter_names))
    _check_known(names, configs, BASE)
    if BASE in names and layout.head and not hasattr(model, layout.head[-1]):
        raise ValueError(
            f"adapter_names has {BASE!r}, but {type(model).__name__} has no head that could answer: give these "
            "rows the name of an adapter."
        )
    tokens = [name for name in names if (classifies_tokens(model) if name == BASE else configs[name].reads_tokens)]
    if tokens and len(names) > 1:
        raise ValueError(
            f"adapter {tokens[0]!r} classifies tokens, so its rows have answers of another shape than those of "
            "others: run them in a separate call, or give tasks=[...] in place of adapter_names."
        )
    _check_frozen(badge, "adapter_names", names)


def check_tasks(badge: Any, tasks: Sequence[str]) -> None:
    """Refuses, with a ValueError, tasks that cannot share a pass."""
    names = [] if isinstance(tasks, str) else list(tasks)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"tasks must be a list with the names of adapters, got {tasks!r}: the model has "
            f"{', '.join(map(repr, badge.peft_config))}."
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"tasks has {twice[0]!r} more than once: name each adapter once, it answers every row.")
    _check_known(names, badge.peft_config)
    _check_frozen(badge, "tasks", names)


def config_of_each(given: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """The early-exit config of each task: `given` for all of them, or by task in a dict, in which one that is left out
    keeps its own, None."""
    if not isinstance(given, Mapping) or not given or not all(_is_config(value) for value in given.values()):
        return dict.fromkeys(tasks, given)
    unknown = [name for name in given if name not in tasks]
    if unknown and not all(name in EarlyExitConfig.__dataclass_fields__ for name in given):
        raise ValueError(
            f"early_exit_config has {unknown[0]!r}, which is no task of this call; they are "
            f"{', '.join(map(repr, tasks))}."
        )
    return dict.fromkeys(tasks, given) if unknown else {name: given.get(name) for name in tasks}


def _is_config(value: Any) -> bool:
    return value is None or isinstance(value, (dict, EarlyExitConfig))


def _check_known(names: Iterable[str], configs: dict[str, BadgeConfig], *others: str) -> None:
    unknown = [name for name in names if name not in configs and name not in others]
    if unknown:
        raise ValueError(f"there is no adapter {unknown[0]!r}; the model has {', '.join(map(repr, configs))}.")


def _check_frozen(badge: Any, argument: str, names: Sequence[str]) -> None:
    """Refuses adapters that change what the others' rows pass through; `argument` named them."""
    for name in (*names, *badge.active_adapters):
        changes = None if name == BASE else _changes(badge.model, badge.layout, name, badge.peft_config[name])
        if changes is None:
            continue
        if name in names:
            raise ValueError(
                f"adapter {name!r} has {changes}, so its rows cannot share a pass with those of others: run them in a "
                f"separate call, after set_adapter({name!r}). {argument} takes adapters with backbone='frozen' "
                "that save no module but the model's head."
            )
        raise ValueError(
            f"the active adapter {name!r} has {changes}, which all rows would pass through: call set_adapter with "
            "the name of another one first."
        )


def _changes(model: nn.Module, layout: BlockLayout, name: str, config: BadgeConfig) -> str | None:
    """What of an adapter changes the model before its head, or a head of which it has a copy; None: nothing does."""
    if config.backbone != "frozen":
        return f"backbone={config.backbone!r}"
    if {NO_HEAD, *layout.head}.issuperset(config.modules_to_save or ()):
        return None  # without a walk through the model, which a call of 32 rows would notice
    for module_name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            top, _, inside = module_name.partition(".")
            if top not in layout.head or (inside and top in (config.modules_to_save or ())):
                return f"modules_to_save=[{base_name(module_name)!r}]"
    return None
