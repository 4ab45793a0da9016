"""An optimizer in standardized coordinates: equal to a model that standardizes its inputs, and unseen by files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from badge_peft import MultiExitTrainingArguments, make_optimizer
from badge_peft.model import get_badge_model
from badge_peft.training.conditioning import KEY, Conditioning, Coordinates, Moments
from tests.models import make_badge, make_batch

from .runs import Rows, make, make_trainer, weights


def states(rows=64, width=8, seed=0):
    """A large common vector with a small signal on it."""
    draw = torch.Generator().manual_seed(seed)
    return 10 * torch.randn(width, generator=draw) + 0.1 * torch.randn(rows, width, generator=draw)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_layer_learns_as_one_on_standardized_inputs(kind):
    x, y = states(), torch.arange(64) % 3
    mean, sigma = x.mean(dim=0), x.std(dim=0, correction=0)
    own = nn.Linear(8, 3)
    other = copy.deepcopy(own)
    with torch.no_grad():  # the same function of x
        other.bias += other.weight @ mean
        other.weight *= sigma
    coordinates = Coordinates(own.weight, own.bias, sigma, mean)
    steps = [kind(layer.parameters(), lr=0.05, weight_decay=0.0) for layer in (own, other)]
    steps[0].register_step_pre_hook(lambda *_: coordinates.enter())
    steps[0].register_step_post_hook(lambda *_: coordinates.leave())
    for _ in range(20):
        for layer, inputs, step in ((own, x, steps[0]), (other, (x - mean) / sigma, steps[1])):
            step.zero_grad()
            nn.functional.cross_entropy(layer(inputs), y).backward()
            step.step()
    assert torch.allclose(own(x), other((x - mean) / sigma), atol=1e-3)


def test_a_layer_without_a_bias_keeps_its_answer_to_the_mean():
    x = states()
    mean, sigma = x.mean(dim=0), x.std(dim=0)
    layer = nn.Linear(8, 3, bias=False)
    before = layer.weight.detach() @ mean
    coordinates = Coordinates(layer.weight, None, sigma, mean)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.0)
    old = layer.weight.detach().clone()
    layer(x).square().sum().backward()
    coordinates.enter()
    optimizer.step()
    coordinates.leave()
    assert not torch.allclose(layer.weight, old) and torch.allclose(layer.weight @ mean, before, atol=1e-4)


def test_moments_are_those_of_all_inputs():
    x = states(100)
    moments = Moments()
    for part in x.split(30):
        moments.add(part)
    mean, sigma, within = moments.standard()
    assert torch.allclose(mean, x.mean(dim=0), atol=1e-5) and within == pytest.approx(
        float(x.std(dim=1).mean()), rel=1e-5
    )
    pooled = (100 * x.var(dim=0, correction=0) + 16 * x.var(dim=0, correction=0).mean()) / 116
    assert torch.allclose(sigma, pooled.sqrt(), rtol=1e-3)


@pytest.mark.parametrize("few", [states(8), torch.ones(40, 8)], ids=["few", "equal"])
def test_inputs_that_say_nothing_change_nothing(few):
    moments = Moments()
    moments.add(few)
    assert moments.standard() is None and Moments().standard() is None


def test_padding_is_no_input():
    model, batch = make_badge(exit_pooling="mean"), make_batch(rows=20)
    batch["attention_mask"][:, 3:] = 0
    for noise in (0, 5):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][:, 3:] = noise
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        Conditioning(get_badge_model(model), optimizer)
        model.train()(**changed, labels=torch.zeros(20, dtype=torch.long)).loss.backward()
        optimizer.step()
        found = optimizer.param_groups[0][KEY]
        downs = torch.stack([value for name, value in found.items() if name.endswith(".down")])
        if noise == 0:
            first, before = downs, copy.deepcopy(model.state_dict())
        model.load_state_dict(before)
    assert torch.allclose(first, downs, atol=1e-4)


def test_a_step_starts_from_the_blocks_own_output_and_files_know_nothing(tmp_path):
    model, batch = make_badge(), make_batch(rows=20)
    names = set(model.state_dict())
    optimizer = make_optimizer(model)
    before = model.eval()(**batch).exit_logits
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model.train()(**batch, labels=torch.zeros(20, dtype=torch.long)).loss.backward()
    optimizer.step()
    assert torch.allclose(model.eval()(**batch).exit_logits, before, atol=1e-4)  # W_up = 0: W_down may be anything
    assert set(model.state_dict()) == names and optimizer.param_groups[0][KEY]


def test_a_resumed_training_goes_on_in_the_same_coordinates(tmp_path):
    data, straight, resumed = Rows(rows=20), make(), make()
    options = {"standardize": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    options |= {"per_device_train_batch_size": 20, "adapter_learning_rate": 0.01}
    make_trainer(tmp_path / "a", straight, data, **options).train()
    trainer = make_trainer(tmp_path / "b", resumed, data, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, value in weights(straight).items():
        assert torch.allclose(value, weights(resumed)[name], atol=1e-5), name


def test_it_can_be_left_out(tmp_path):
    trainer = make_trainer(tmp_path, make(), Rows(rows=20), max_steps=2, per_device_train_batch_size=20)
    trainer.train()
    assert KEY not in trainer.optimizer.param_groups[0]
    assert MultiExitTrainingArguments(str(tmp_path)).standardize
