"""That each row of a call goes through its adapter's own head: tests/early_exit/test_adapter_names.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from badge_peft import BadgeConfig
from badge_peft.tuner.saved_modules import answer_by_adapters
from tests.models import make_badge, shake


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
    assert type(model.get_base_model().classifier) is ModulesToSaveWrapper  # PEFT's own
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.add_adapter("third", BadgeConfig())
        assert hooks(copied) == [1] * wrappers
    base = model.unload()
    assert not any(module._forward_hooks for module in base.modules())
