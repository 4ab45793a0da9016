"""`adapter_names`: rows of different adapters in one pass.

A frozen backbone and untouched states H_m mean that the blocks compute the same for every adapter: rows of all tasks
travel through them together, and each is read by the exits of its own adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from badge_peft.early_exit.calls import Question
from badge_peft.early_exit.policy_reader import PolicyReader
from badge_peft.outputs import EarlyExitOutput
from badge_peft.tuner.architectures import BlockLayout, base_name
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.prepare import NO_HEAD, classifies_tokens
from badge_peft.tuner.saved_modules import RowHeads

#: PEFT's name for rows without an adapter: the base model answers them, at full depth.
BASE = "__base__"


class RowOrder:
    """The rows of one adapter side by side, and back again.

    Args:
        adapter_names: One for each row, B.
        config: How to stop, as the call has it.

    Attributes:
        questions: One for each of the different names, in the order of their first row.
    """

    def __init__(self, adapter_names: Sequence[str], config: Any = None) -> None:
        names = list(dict.fromkeys(adapter_names))
        self._which = np.array([names.index(name) for name in adapter_names])
        self._order = torch.from_numpy(self._which.argsort(kind="stable"))
        counts: list[int] = np.bincount(self._which).tolist()
        self.questions = [
            Question(name, end - count, count, config)
            for name, count, end in zip(names, counts, accumulate(counts), strict=True)
        ]

    def sort(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs with their rows in the new order; what all rows share stays as it is."""
        rows = len(self._which)
        return {
            name: value.index_select(0, self._order.to(value.device))
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
            else value
            for name, value in inputs.items()
        }

    def heads(self, readers: Sequence[PolicyReader]) -> RowHeads:
        """Each row goes through the copy of its own adapter."""
        return RowHeads([(question.adapter, question.rows) for question in self.questions])

    def output(self, readers: Sequence[PolicyReader]) -> EarlyExitOutput:
        """The output of all rows as they came, from the reader of each adapter."""
        found = [reader.output() for reader in readers]
        answers: list[Any] = [output.logits for output in found]
        labels = [answer.shape[-1] for answer in answers]
        dtype = reduce(torch.promote_types, (answer.dtype for answer in answers))
        wide = [F.pad(x.to(dtype), (0, max(labels) - x.shape[-1]), value=-torch.inf) for x in answers]
        exits, non_finite = (torch.cat([output[name] for output in found]) for name in ("exit_layer", "non_finite"))
        tokens: Any = found[0].token_exit_layer  # such an adapter has all rows
        device = wide[0].device
        back = self._order.argsort().to(device)
        return EarlyExitOutput(
            logits=torch.cat(wide)[back],
            exit_layer=exits[back],
            non_finite=non_finite[back],
            token_exit_layer=None if tokens is None else tokens[back],
            num_labels=torch.tensor(labels)[torch.from_numpy(self._which)].to(device),
        )


def check_adapter_names(
    adapter_names: Sequence[str],
    batch_size: int,
    model: nn.Module,
    layout: BlockLayout,
    configs: dict[str, BadgeConfig],
    active: Sequence[str],
) -> None:
    """Refuses rows that cannot share a pass.

    Args:
        adapter_names: One for each row.
        batch_size: B.
        model: The base model.
        layout: Where its parts are.
        configs: Of the named adapters and of the active ones.
        active: Names of the active adapters, which every row passes through.

    Raises:
        ValueError: not one name for each row, or an adapter that changes what other rows pass through.
    """
    named = not isinstance(adapter_names, str) and all(isinstance(name, str) for name in adapter_names)
    if not named or len(adapter_names) != batch_size:
        raise ValueError(
            f"adapter_names must give one name for each of the {batch_size} rows, got {adapter_names!r}: repeat the "
            "name of an adapter for each of its rows."
        )
    names = list(dict.fromkeys(adapter_names))
    check_known(names, configs, BASE)
    if BASE in names and layout.head and not hasattr(model, layout.head[-1]):
        raise ValueError(
            f"adapter_names has {BASE!r}, but {type(model).__name__} has no head that could answer: give these "
            "rows the name of an adapter."
        )
    tokens = [name for name in names if (classifies_tokens(model) if name == BASE else configs[name].reads_tokens)]
    if tokens and len(names) > 1:
        raise ValueError(
            f"adapter {tokens[0]!r} classifies tokens, so its rows have answers of another shape than those of "
            "others: run them in a call of their own, or give tasks=[...] in place of adapter_names."
        )
    check_frozen("adapter_names", names, model, layout, configs, active)


def check_known(names: Iterable[str], configs: dict[str, BadgeConfig], *others: str) -> None:
    """Refuses names of adapters that the model does not have; `others` are allowed, too.

    Raises:
        ValueError: which one.
    """
    unknown = [name for name in names if name not in configs and name not in others]
    if unknown:
        raise ValueError(f"there is no adapter {unknown[0]!r}; the model has {', '.join(map(repr, configs))}.")


def check_frozen(
    argument: str,
    names: Sequence[str],
    model: nn.Module,
    layout: BlockLayout,
    configs: dict[str, BadgeConfig],
    active: Sequence[str],
) -> None:
    """Refuses adapters that change what the others' rows pass through.

    Args:
        argument: What named them.
        names: The adapters, each once.
        model: The base model.
        layout: Where its parts are.
        configs: Of the named adapters and of the active ones.
        active: Names of the active adapters, which every row passes through.

    Raises:
        ValueError: which one, what it changes, and the remedy.
    """
    for name in (*names, *active):
        changes = None if name == BASE else _changes(model, layout, name, configs[name])
        if changes is None:
            continue
        if name in names:
            raise ValueError(
                f"adapter {name!r} has {changes}, so its rows cannot share a pass with those of others: run them in a "
                f"call of their own, after set_adapter({name!r}). {argument} takes adapters with backbone='frozen' "
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
