"""Another of PEFT's adapters on top of BADGE. (Below it: tests/integrations/test_lora_underneath.py.)"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from badge_peft import BadgeConfig
from tests.models import exits_of, make_badge, make_batch

LORA = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
WAYS: dict[str, Callable[[Any], Any]] = {
    "get_peft_model": lambda model: get_peft_model(model, LORA),
    "another name": lambda model: get_peft_model(model, LORA, adapter_name="other"),
    "all linear": lambda model: get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")),
    "on the tuner": lambda model: get_peft_model(model.base_model, LORA),
    "on the base": lambda model: get_peft_model(model.get_base_model(), LORA),
    "IA3": lambda model: get_peft_model(
        model, IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
    ),
    "inject_adapter_in_model": lambda model: inject_adapter_in_model(LORA, model, "other"),
    # as transformers' own add_adapter does
    "into the base": lambda model: inject_adapter_in_model(LORA, model.get_base_model(), "other"),
}
COPIES: dict[str, Callable[[PeftModel], PeftModel]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_on_top_is_refused_and_nothing_is_lost(way: str, copied: str) -> None:
    model, batch = COPIES[copied](make_badge().eval()), make_batch()
    before, names = exits_of(model, batch), list(model.state_dict())
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"cannot be put on a model that carries a BADGE adapter \('default' \(BADGE"):
        WAYS[way](model)
    assert torch.equal(exits_of(model, batch), before) and list(model.state_dict()) == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert list(model.peft_config) == ["default"] and isinstance(model.peft_config["default"], BadgeConfig)


def test_the_remedy_works() -> None:
    model = make_badge().eval()
    model = get_peft_model(model.unload(), LORA).merge_and_unload()
    assert exits_of(get_peft_model(model, BadgeConfig(r=4)).eval(), make_batch()).shape[0] == 4


def test_adapters_of_ours_may_be_added_replaced_and_deleted() -> None:
    model = make_badge()
    model.add_adapter("other", BadgeConfig(r=2))
    model.peft_config.update({"other": model.peft_config["other"]}, default=model.peft_config["default"])
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
