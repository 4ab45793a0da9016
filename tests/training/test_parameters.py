"""Parameter groups: each trainable parameter in one of them, at the rate of its part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import get_linear_schedule_with_warmup

from badge_peft import BadgeConfig, make_optimizer, parameter_groups
from tests.models import make_batch, make_model


def make(**fields: Any) -> Any:
    return get_peft_model(make_model(), BadgeConfig(task_type="SEQ_CLS", **fields))


def test_each_part_has_its_rate() -> None:
    model = make(backbone="full")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {"adapter": 0.5, "backbone": 0.25, "head": 0.125}
    for group in parameter_groups(model, adapter_lr=0.5, backbone_lr=0.25, head_lr=0.125):
        assert group["lr"] == rates.pop(group["name"], group["lr"])
        for name in (names[id(parameter)] for parameter in group["params"]):
            part = "adapter" if ".badge_" in name else "head" if ".modules_to_save." in name else "backbone"
            assert group["name"] == part
    assert not rates


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"backbone": "full"}, {"backbone": 5e-5, "head": 5e-5, "adapter": 2.5e-3}),
        ({"backbone": "lora"}, {"backbone": 1e-3, "head": 2.5e-4, "adapter": 2.5e-3}),
        ({"backbone": "frozen"}, {"head": 2.5e-4, "adapter": 2.5e-3}),
        ({"backbone": "frozen", "train_head": False}, {"adapter": 2.5e-3}),
    ],
)
def test_default_rates(fields: dict[str, Any], expected: dict[str, float]) -> None:
    model = make(**fields)
    groups = parameter_groups(model)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(expected)
    assert all(group["weight_decay"] == 0 for group in groups)


def test_biases_and_norms_do_not_decay() -> None:
    model = make(backbone="full", bias=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays: dict[str, float] = {}
    for group in parameter_groups(model, weight_decay=0.1):
        decays.update({names[id(parameter)]: group["weight_decay"] for parameter in group["params"]})
    free = {name for name, decay in decays.items() if decay == 0}
    assert free == {name for name in decays if name.endswith("bias") or "norm" in name.lower()}
    assert {decay for name, decay in decays.items() if name not in free} == {0.1}


def test_nothing_to_train() -> None:
    model = make()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable.*is_trainable=True"):
        parameter_groups(model)


def test_the_optimizer_moves_both_parts_and_a_schedule_scales_both_rates() -> None:
    model = make(backbone="full").train()
    optimizer = make_optimizer(model, adapter_lr=1e-2, backbone_lr=1e-4)
    assert isinstance(optimizer, torch.optim.AdamW)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(**make_batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    schedule.step()
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    assert max(v for name, v in moved.items() if ".badge_" in name) == pytest.approx(1e-2, rel=0.01)
    assert max(v for name, v in moved.items() if "bert.encoder" in name and ".badge_" not in name) == pytest.approx(
        1e-4, rel=0.01
    )
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"adapter": 5e-3, "backbone": 5e-5, "head": 5e-5})
