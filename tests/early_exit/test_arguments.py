"""What a call may be given: by place or by name, and what is refused with what was meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from badge_peft import EarlyExitConfig
from tests.models import exits_of, make_badge, make_batch

from .reference import SINGLE
from .rules import fields_of


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("exit_type", ["linear", "mha"])
def test_a_mask_by_place_reaches_the_exits(exit_type, pooling) -> None:
    model, batch = make_badge(exit_pooling=pooling, exit_type=exit_type, final_exit="exit"), make_batch()
    with torch.no_grad():
        found = model.base_model(batch["input_ids"], batch["attention_mask"]).exit_logits
    assert torch.equal(found, exits_of(model, batch))
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model.base_model(batch["input_ids"], **batch)


def test_misspelt_tensors() -> None:
    model, batch = make_badge(), make_batch()
    with pytest.raises(ValueError, match="atention_mask is no argument of Bert.*: is attention_mask meant"):
        model.early_exit_forward(input_ids=batch["input_ids"], atention_mask=batch["attention_mask"])


def test_lists_are_no_tensors() -> None:
    model = make_badge()
    for call in (model, model.early_exit_forward):
        with pytest.raises(ValueError, match="inputs are list, and the model needs tensors.*return_tensors='pt'"):
            call(input_ids=[[1, 2]])


def test_a_config_that_does_not_fit_is_refused_when_it_is_set() -> None:
    model = make_badge()
    with pytest.raises(ValueError, match="max_exit=99 is not allowed: the model has 3 blocks"):
        model.set_early_exit_config({"max_exit": 99})
    good = fields_of("agreement", [1, 2, 3], 3, SINGLE)
    some: list[dict[str, Any]] = [{"coefficients": [1, 2, 3]}, {"intercepts": [1]}, {"reference": "x"}]
    some += [{"coefficients": [["a"]] * 3}, {"coefficients": [[1.0], [], [1.0]]}, {"exits": ["1", "2", "3"]}]
    for wrong in (*some, {"exits": None}, {"coefficients": None}, {"intercepts": None}):
        with pytest.raises(ValueError, match="parameters of policy='agreement' are not as calibrate writes them"):
            model.set_early_exit_config({**good, "parameters": {**good["parameters"], **wrong}})
    assert model.get_early_exit_config() == EarlyExitConfig()
    model.set_early_exit_config(good)
    assert model.get_early_exit_config().policy == "agreement"
    with pytest.raises(ValueError, match="EarlyExitConfig has no field 1"):
        EarlyExitConfig.of({1: 2})
