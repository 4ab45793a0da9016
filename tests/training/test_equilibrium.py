"""Gradient equilibrium against autograd, exit by exit: the gradient of each block's parameters is the mean of those of
the exits at it and behind it, c_m = 1 / n_m times their sum; the exits' own parameters are not rescaled."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from badge_peft import ARCHITECTURES
from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.training.passes import GradientEquilibriumPass
from badge_peft.tuner.architectures import head_pooling
from tests import reference
from tests.models import (
    CASES,
    LINKS,
    blocks_of,
    checkpoint,
    crossed,
    exits_of,
    make_badge,
    make_batch,
    make_labels,
    make_model,
)
from tests.passes import full_depth

BATCH, TARGET = make_batch(), make_labels()
PLACEMENTS = ("block", "ffn", "mhsa", "none")


def unshared(case):
    """A model, and the same numbers in one whose blocks share no parameters (ALBERT's do)."""
    base = make_model(case)
    if base.config.model_type != "albert" or case == "albert-inner":  # whose 4 blocks run once each
        return base, base
    layers, groups = base.config.num_hidden_layers, base.config.num_hidden_groups
    plain = make_model(case, num_hidden_groups=layers)
    state = base.state_dict()
    for name in plain.state_dict():
        state[name] = base.state_dict()[shared_name(name, layers, groups)]
    plain.load_state_dict(state)
    return base, plain


def shared_name(name, layers, groups):
    return re.sub(r"groups\.(\d+)", lambda m: f"groups.{int(m[1]) * groups // layers}", name)


def number_of(model, name):
    """The block number to which a parameter of a plain model belongs; 0 for the embeddings, None elsewhere."""
    match = re.search(r"albert_layer_groups\.(\d+)\.albert_layers\.(\d+)\.|\blayers?\.(\d+)\.", name)
    if match is None:
        return 0 if "embedding" in name and "rel_" not in name else None
    if match[3] is not None:
        return int(match[3]) + 1
    return int(match[1]) * getattr(model.config, "inner_group_num", 1) + int(match[2]) + 1


def expected_gradients(plain, model, numbers):
    """By autograd, for each exit on its own: name -> c_m * sum of the gradients of the exits' losses."""
    config = model.peft_config["default"]
    own = {name: p.detach().clone().requires_grad_() for name, p in reference.own_weights(model).items()}
    plain.requires_grad_(True)
    parameters = {**dict(plain.named_parameters()), **own}
    layout = ARCHITECTURES[plain.config.model_type]
    total = dict.fromkeys(parameters, 0.0)
    for logits in reference.all_logits(plain, config, own, BATCH, head_pooling(plain, layout)):
        loss = reference.cross_entropy(logits, TARGET)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] = total[name] + (0.0 if gradient is None else gradient)
    found = {}
    for name, gradient in total.items():
        number = None if name in own else number_of(plain, name)
        found[name] = gradient if number is None else gradient / sum(m >= number for m in numbers)
    return found


def compare(case, exit_pass=GradientEquilibriumPass, checkpointing=None, **fields):
    base, plain = unshared(case)
    base, plain = base.double(), copy.deepcopy(plain).double()
    model = make_badge(case, base=base, backbone="full", exit_dropout=0.0, **fields)
    numbers = model.base_model.exit_layers()
    before = exits_of(model, BATCH)
    if checkpointing is not None:
        checkpoint(model, checkpointing)
    exits = model.train()(**BATCH, exit_pass=exit_pass).exit_logits
    assert torch.equal(exits, before)  # the pass itself is as ever
    sum(reference.cross_entropy(x, TARGET) for x in exits.unbind(dim=1)).backward()
    found = dict(reference.own_weights(model))
    for name, parameter in model.get_base_model().named_parameters():
        if ".badge_" not in name and ".original_module." not in name:
            found[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = parameter
    expected = expected_gradients(plain, model, numbers)
    if plain.config.model_type == "albert" and case != "albert-inner":
        layers, groups = plain.config.num_hidden_layers, base.config.num_hidden_groups
        summed = {}
        for name, gradient in expected.items():
            shared = shared_name(name, layers, groups)
            summed[shared] = summed.get(shared, 0.0) + gradient
        expected = summed
    compared = 0
    for name, gradient in expected.items():
        if re.search(r"rel_embeddings|encoder\.LayerNorm|encoder\.conv|relative_attention", name):
            continue  # DeBERTa and MPNet hand these to several blocks, or has them between two
        if case == "deberta-v2" and 0 in numbers and name.startswith("deberta.embeddings"):
            continue  # and its convolution takes the embeddings past block 1
        if found[name].grad is None:
            assert not torch.is_tensor(gradient) or not gradient.any()
            continue
        compared += number_of(plain, name) not in (0, None)
        close = 1e-9 + 1e-6 * gradient.abs().max()  # some of ModernBERT is float32 whatever the weights are
        assert (found[name].grad - gradient).abs().max() <= close, name
    assert compared >= 8
    return expected


@pytest.mark.parametrize(("case", "placement"), crossed(CASES, PLACEMENTS))
def test_every_backbone(case, placement):
    compare(case, placement=placement)


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize(("case", "placement"), [("bert", "block"), ("albert", "mhsa"), ("modernbert-mean", "ffn")])
def test_exits_that_build_on_one_another(case, placement, link):
    compare(case, placement=placement, exit_layers=[0, 1, 3], final_exit="exit", **link)


@pytest.mark.parametrize("exit_layers", [[0, 1, 2, 3], [0, 2], [2], [1, 3], [0, 3], [3]], ids=str)
@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_sets_of_exits(placement, final_exit, exit_layers):
    compare("bert", placement=placement, final_exit=final_exit, exit_layers=exit_layers)


@pytest.mark.parametrize("exit_layers", [None, [0, 2]], ids=str)
@pytest.mark.parametrize("case", ["albert", "distilbert", "deberta-v2", "modernbert-mean"])
@pytest.mark.parametrize("placement", ["mhsa", "none"])
def test_other_backbones(case, placement, exit_layers):
    compare(case, placement=placement, final_exit="exit", exit_layers=exit_layers)


@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-cls"])
@pytest.mark.parametrize("placement", ["block", "mhsa"])
@pytest.mark.parametrize("exit_type", ["pooled", "mha"])
def test_other_exits(case, placement, exit_type):
    compare(case, placement=placement, final_exit="exit", exit_layers=[0, 1, 2, 3], exit_type=exit_type)


@pytest.mark.parametrize("placement", ["block", "mhsa"])
@pytest.mark.parametrize("case", ["bert", "modernbert-mean"])
def test_with_checkpointing(case, placement):
    compare(case, placement=placement, checkpointing={"use_reentrant": False})


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_joint_training_is_not_in_equilibrium(placement):
    """The comparison above notices: without the rescaling it fails."""
    with pytest.raises(AssertionError, match="bert.embeddings"):
        compare("bert", exit_pass=EarlyExitPass, placement=placement)


@pytest.mark.parametrize("placement", ["block", "mhsa"])
def test_lora_of_a_block_is_rescaled_as_the_block(placement):
    """Of three exits, each weighs a third in block 1, half in block 2."""
    lora = {"r": 2, "target_modules": "all-linear"}
    model = make_badge(placement=placement, backbone="lora", lora=lora, final_exit="exit", exit_dropout=0.0).double()
    names = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for parameter in names.values():
            parameter.add_(0.1)
    exits = model(**BATCH).exit_logits.unbind(dim=1)
    sums = torch.autograd.grad(sum(reference.cross_entropy(x, TARGET) for x in exits), list(names.values()))
    exits = model(**BATCH, exit_pass=GradientEquilibriumPass).exit_logits.unbind(dim=1)
    sum(reference.cross_entropy(x, TARGET) for x in exits).backward()
    assert len(names) == 2 * 6 * 3
    for (name, parameter), total in zip(names.items(), sums, strict=True):
        number = int(re.search(r"layer\.(\d+)\.", name)[1]) + 1
        if number == 3 and "output.dense" not in name:
            continue
        torch.testing.assert_close(parameter.grad, total / (4 - number), rtol=1e-8, atol=1e-12)


def test_weights():
    running = full_depth(make_badge(exit_layers=[0, 2, 3]), BATCH, GradientEquilibriumPass)[0]
    assert [running.weight(m) for m in range(4)] == [1 / 3, 1 / 2, 1 / 2, 1]


def test_early_exit_afterwards_is_as_before():
    model = make_badge(final_exit="exit", placement="mhsa")
    before = exits_of(model, BATCH)
    model(**BATCH, exit_pass=GradientEquilibriumPass)
    assert torch.equal(exits_of(model, BATCH), before)
    assert len(blocks_of(model)) == 3
