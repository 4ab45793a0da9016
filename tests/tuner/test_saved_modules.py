"""That each row of a call goes through its adapter's own head: tests/early_exit/test_adapter_names.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from badge_peft import BadgeConfig
from badge_peft.tuner.context import PassContext
from badge_peft.tuner.saved_modules import RowHeads, answer_by_adapters
from tests.models import blocks_of, exits_of, make_badge, make_batch, make_model, shake


def hooks(model: nn.Module) -> list[int]:
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [list(wrapper._forward_hooks.values()).count(answer_by_adapters) for wrapper in wrappers]


def make_two(case: str = "bert", **fields: Any) -> Any:
    model = make_badge(case, **fields)
    model.add_adapter("second", BadgeConfig())
    shake(model)
    return model


@pytest.mark.parametrize(("case", "wrappers"), [("bert", 1), ("distilbert", 2), ("deberta-v2", 2)])
def test_each_wrapper_has_one_hook(case: str, wrappers: int) -> None:
    model = make_two(case)
    assert hooks(model) == [1] * wrappers
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.add_adapter("third", BadgeConfig())
        assert hooks(copied) == [1] * wrappers
    base = model.unload()
    assert not any(module._forward_hooks for module in base.modules())


def test_wrappers_stay_pefts_own_and_calls_of_one_adapter_are_theirs() -> None:
    model = make_two()
    wrapper = model.get_base_model().classifier
    assert type(wrapper) is ModulesToSaveWrapper
    states = torch.randn(4, 32)
    assert answer_by_adapters(wrapper, (states,), {}, None) is None  # outside of a call
    with PassContext():
        assert torch.equal(wrapper(states), wrapper.modules_to_save["default"](states))


@pytest.mark.parametrize("active", ["default", "second"])
def test_rows_of_two_adapters_and_of_none(active: str) -> None:
    model = make_two()
    model.set_adapter(active)
    wrapper = model.get_base_model().classifier
    states = torch.randn(6, 32)
    run = PassContext()
    run.heads = RowHeads([("second", 1), ("__base__", 2), ("default", 3)])
    with run:
        found = wrapper(states)
    heads = [wrapper.modules_to_save["second"], wrapper.original_module, wrapper.modules_to_save["default"]]
    expected = [head(part) for head, part in zip(heads, states.split([1, 2, 3]), strict=True)]
    assert torch.equal(found, torch.cat(expected))
    run.heads = RowHeads([("__base__", 6)])
    with run:
        assert torch.equal(wrapper(states), make_model().classifier(states))
    assert exits_of(model, make_batch()).shape[0] == 4 and blocks_of(model)
