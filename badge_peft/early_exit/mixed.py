"""`mixed_forward`: one pass for rows of different adapters.

A frozen backbone and untouched states H_m mean that the blocks compute the same for every adapter: rows of all tasks
travel through them together, and each is read by the exits of its own adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from badge_peft.early_exit.pass_ import LeavingRun
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.readers import EarlyExitRun, run_fields
from badge_peft.model import BadgeModel
from badge_peft.outputs import EarlyExitOutput
from badge_peft.tuner.full_depth import count_rows
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.prepare import NO_HEAD
from badge_peft.tuner.run import Frame

Array = np.ndarray

#: PEFT's name for rows without an adapter: the base model answers them, at full depth.
BASE = "__base__"


class MixedRun(LeavingRun):
    """Groups of rows, each with the exits, the policy and the history of its adapter; all survivors travel together.

    Args:
        groups: A run for each adapter; its rows lie behind those of the one before it in the batch.
        attention_mask: [B, S] or None, of all rows.
        num_blocks: M.
    """

    def __init__(self, groups: list[EarlyExitRun], attention_mask: Tensor | None, num_blocks: int) -> None:
        rows = [group.batch_size for group in groups]
        super().__init__("", sum(rows), attention_mask, "cls", exit_layers=[num_blocks])
        self.groups = groups
        self.shares = [(group.adapter, group.batch_size) for group in groups]
        for group, end in zip(groups, accumulate(rows), strict=True):
            group.exit_layer = self.exit_layer[end - group.batch_size : end]  # a view: what it writes is written here

    def read_exit(self, block: BadgeBlock, number: int, frame: Frame) -> None:
        """Each group that has rows left reads its own exit."""
        start = 0
        for group in self.groups:
            end = start + len(group.survivors.rows)
            before = group.left
            if before:
                group.read_exit(block, number, frame.rows(start, end))
                self.left -= before - group.left
                self.waiting = self.waiting or group.left < before
            start = end

    def keep(self, going: Array, index: Tensor, length: int | None) -> None:
        """Goes on with the survivors `going`, in each group with its own."""
        start = 0
        for group in self.groups:
            end = start + len(group.survivors.rows)
            own = slice(*np.searchsorted(going, (start, end)))
            group.survivors.rows = group.survivors.rows[going[own] - start]
            group.keep(going[own] - start, index[own] - start, length)
            start = end
        self.waiting = False

    def answers(self, logits: Tensor | None) -> list[Tensor]:
        """The answers of each group [b, K]; `logits` [B, *] are those of the model's own head, where it has one."""
        start, found = 0, []
        for group in self.groups:
            end = start + group.batch_size
            if group.left:
                assert logits is not None  # `check_names` has seen to it
                group.finish(logits[start:end])
            assert group.answer is not None  # every row has answered
            found.append(group.answer)
            start = end
        return found


def mixed_forward(
    badge: BadgeModel,
    adapter_names: Sequence[str],
    early_exit_config: Any,
    overrides: dict[str, Any],
    inputs: dict[str, Any],
) -> EarlyExitOutput:
    """`early_exit_forward` with `adapter_names`; see there."""
    batch_size = count_rows(**inputs)
    names = check_names(badge, adapter_names, batch_size)
    places = np.array([names.index(name) for name in adapter_names])
    order = torch.from_numpy(places.argsort(kind="stable"))  # the rows of one adapter side by side
    inputs = {name: _in_order(value, order, batch_size) for name, value in inputs.items()}
    if badge.compiled is not None:
        inputs = badge.compiled.pad(inputs)
    mask = inputs.get("attention_mask")
    counts = np.bincount(places).tolist()
    groups = []
    for name, count, end in zip(names, counts, accumulate(counts), strict=True):
        own_mask = mask[end - count : end] if mask is not None and mask.shape[0] == batch_size else mask
        groups.append(_group(badge, name, count, own_mask, early_exit_config, overrides))
    run = MixedRun(groups, mask, badge.num_blocks)
    run.compiled = badge.compiled
    with run:
        base = badge.model(return_dict=True, **inputs)
    answers = run.answers(base.get("logits"))
    labels = [answer.shape[1] for answer in answers]
    dtype = reduce(torch.promote_types, (answer.dtype for answer in answers))
    wide = [F.pad(x.to(dtype), (0, max(labels) - x.shape[1]), value=-torch.inf) for x in answers]
    back = order.argsort()
    return EarlyExitOutput(
        logits=torch.cat(wide)[back.to(wide[0].device)],
        exit_layer=torch.from_numpy(run.exit_layer)[back].to(wide[0].device),
        num_labels=torch.tensor(labels)[torch.from_numpy(places)].to(wide[0].device),
    )


def check_names(badge: BadgeModel, adapter_names: Sequence[str], batch_size: int) -> list[str]:
    """The different ones among the names of the rows, in the order of their first row.

    Raises:
        ValueError: not one name for each row, a name that the model does not have, or an adapter that changes what
            other rows pass through.
    """
    named = not isinstance(adapter_names, str) and all(isinstance(name, str) for name in adapter_names)
    if not named or len(adapter_names) != batch_size:
        raise ValueError(
            f"adapter_names must give one name for each of the {batch_size} rows, got {adapter_names!r}: repeat the "
            "name of an adapter for each of its rows."
        )
    names = list(dict.fromkeys(adapter_names))
    for name in names:
        changes = None if name == BASE else _changes(badge, name)
        if changes is not None:
            raise ValueError(
                f"adapter {name!r} has {changes}, so its rows cannot share a pass with those of others: run them in a "
                f"call of their own, after set_adapter({name!r}). adapter_names takes adapters with backbone='frozen' "
                "that save no module but the model's head."
            )
    assert badge.layout is not None
    if BASE in names and badge.layout.head and not hasattr(badge.model, badge.layout.head[-1]):
        raise ValueError(
            f"adapter_names has {BASE!r}, but {type(badge.model).__name__} has no head that could answer: give these "
            "rows the name of an adapter."
        )
    for name in badge.active_adapters:
        changes = _changes(badge, name)
        if changes is not None:
            raise ValueError(
                f"the active adapter {name!r} has {changes}, which all rows would pass through: call set_adapter with "
                "the name of another one first."
            )
    return names


def _changes(badge: BadgeModel, name: str) -> str | None:
    """What of an adapter changes the model before its head; None: nothing does."""
    config = badge.config_of(name)
    if config.backbone != "frozen":
        return f"backbone={config.backbone!r}"
    assert badge.layout is not None
    if {NO_HEAD, *badge.layout.head}.issuperset(config.modules_to_save or ()):
        return None  # without a walk through the model, which a call of 32 rows would notice
    for module_name, module in badge.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            if module_name.split(".")[0] not in badge.layout.head:
                return f"modules_to_save=[{module_name!r}]"
    return None


def _group(
    badge: BadgeModel, name: str, rows: int, mask: Tensor | None, config: Any, overrides: dict[str, Any]
) -> EarlyExitRun:
    """The run of the rows of one adapter."""
    if name == BASE:
        depth = badge.num_blocks
        return EarlyExitRun(
            BASE,
            rows,
            mask,
            "cls",
            exit_layers=[depth],
            policy=build_policy(policy="fixed_depth", depth=depth),
            num_labels=int(badge.model.config.num_labels),
            problem_type="single_label_classification",
        )
    fields = run_fields(badge.config_of(name), config, overrides)
    return badge.new_run(EarlyExitRun, rows, mask, adapter_name=name, **fields)


def _in_order(value: Any, order: Tensor, rows: int) -> Any:
    """An input with its rows in another order; what all rows share stays as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
        return value
    return value.index_select(0, order.to(value.device))
