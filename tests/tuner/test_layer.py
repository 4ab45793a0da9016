from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from badge_peft import BadgeConfig
from badge_peft.tuner.config import CHOICES
from badge_peft.tuner.context import current_pass
from tests import reference
from tests.design import pairs
from tests.models import (
    BLOCKS,
    CASES,
    HIDDEN,
    blocks_of,
    crossed,
    exits_of,
    make_badge,
    make_batch,
    make_model,
    shake,
)

PLACEMENTS = ("block", "ffn", "mhsa", "none")

POOLINGS = ("cls", "mean", "last")


def compare(case: str, pooling: str = "cls", side: str = "right", changes=None, **fields) -> torch.Tensor:
    """Every exit in float64 against the plain reference, with an exit on the embeddings and one at each block where
    `fields` name no others. [B, E, K]"""
    base = make_model(case, **(changes or {})).double()
    blocks = base.config.num_hidden_layers * getattr(base.config, "inner_group_num", 1)
    batch = make_batch(side=side)
    fields = {"exit_layers": list(range(blocks + 1)), "final_exit": "exit", **fields}
    model = make_badge(base=copy.deepcopy(base), exit_pooling=pooling, **fields)
    config = model.peft_config["default"]
    with torch.no_grad():
        expected = torch.stack(reference.all_logits(base, config, reference.own_weights(model), batch, pooling), dim=1)
    found = exits_of(model, batch)
    assert found.shape == (4, len(model.base_model.exit_layers()), 3) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(found[0]) == 1 or (found[:, 1:] - found[:, :-1]).abs().amax(dim=(0, 2)).min() > 1e-3  # exits do differ
    return found


@pytest.mark.parametrize(("case", "placement"), crossed(CASES, PLACEMENTS))
def test_exits_are_those_of_eq_1_and_2(case, placement):
    compare(case, placement=placement)


@pytest.mark.parametrize(
    ("case", "placement", "pooling", "exit_type"),
    pairs(CASES, PLACEMENTS, POOLINGS, ("linear", "pooled", "mha", "residual_mha")),
)
def test_poolings_and_exit_types(case, pooling, exit_type, placement):
    compare(case, pooling, exit_type=exit_type, placement=placement)


@pytest.mark.parametrize("activation", CHOICES["activation"])
@pytest.mark.parametrize("bias", [False, True])
def test_activations_and_biases(activation, bias):
    compare("bert", activation=activation, bias=bias)
    compare("modernbert-cls", activation=activation, bias=bias, placement="ffn", pooling="last")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_on_the_left(pooling):
    compare("bert", pooling, side="left", placement="ffn")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_feed_forward_in_chunks(pooling, placement):
    compare("bert", pooling, changes={"chunk_size_feed_forward": 4}, placement=placement, final_exit="base_head")


@pytest.mark.parametrize(("case", "placement"), pairs(CASES, ("block", "ffn", "mhsa")))
def test_at_initialization_a_bypass_adds_nothing(case, placement):
    """W_up starts at zero and LN' as a copy, so the exits are those of a model without bypasses."""
    batch = make_batch()
    plain = get_peft_model(make_model(case).double(), BadgeConfig(placement="none")).eval()
    model = get_peft_model(make_model(case).double(), BadgeConfig(placement=placement, bias=True)).eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(".badge_bypass." in name for name in missing)
    torch.testing.assert_close(exits_of(model, batch), exits_of(plain, batch), rtol=1e-12, atol=1e-12)


def norms_of(base: nn.Module) -> list[nn.Module]:
    """The norms that LN' of blocks 1 to M copies."""
    with torch.no_grad():
        states, _ = reference.trace(base, make_batch())
    return [reference.exit_norm(base, state.block) for state in states]


@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-cls"])
def test_own_norm_starts_as_a_copy_and_is_one(case):
    base = make_model(case)
    model = get_peft_model(copy.deepcopy(base), BadgeConfig(r=4, final_exit="exit"))
    weights = reference.own_weights(model)
    norms = dict(enumerate(norms_of(base), start=1))
    for number, norm in norms.items():
        assert torch.equal(weights[f"bypass.{number}.norm.weight"], norm.weight)
        assert weights[f"bypass.{number}.norm.weight"].requires_grad
        if norm.bias is not None:
            assert torch.equal(weights[f"bypass.{number}.norm.bias"], norm.bias)
        assert (norm.bias is None) == (f"bypass.{number}.norm.bias" not in weights)
    shake(model, only=".badge_")
    unwrapped = model.unload()
    for number, norm in enumerate(norms_of(unwrapped), start=1):
        assert not torch.equal(weights[f"bypass.{number}.norm.weight"], norm.weight)
        assert torch.equal(norm.weight, norms[number].weight)


@pytest.mark.parametrize(
    ("fields", "bypass", "exit_"),
    [
        ({}, 26_112, 3 * 769),  # 2 * 768 * 16 + 2 * 768
        ({"bias": True}, 26_112 + 16 + 768, 3 * 769),
        ({"r": 8, "placement": "ffn"}, 2 * 768 * 8 + 2 * 768, 3 * 769),
        ({"placement": "none"}, 0, 3 * 769),
        ({"exit_type": "pooled"}, 26_112, 768 * 768 + 768 + 3 * 769),
        ({"exit_type": "mha"}, 26_112, 98_304 + 3 * 769),
        ({"exit_type": "residual_mha"}, 26_112, 98_304 + 3 * 769),
    ],
)
@pytest.mark.parametrize("case", ["bert", "albert"])
def test_number_of_parameters_at_bert_base_size(case, fields, bypass, exit_):
    base = make_model(case, hidden_size=768, num_attention_heads=12, intermediate_size=8)
    model = get_peft_model(base, BadgeConfig(final_exit="exit", **fields))
    assert model.get_nb_trainable_parameters()[0] == BLOCKS * (bypass + exit_)
    weights = reference.own_weights(model)
    for number in range(1, BLOCKS + 1):
        assert sum(p.numel() for name, p in weights.items() if name.startswith(f"bypass.{number}.")) == bypass
        assert sum(p.numel() for name, p in weights.items() if name.startswith(f"exit.{number}.")) == exit_


@pytest.mark.parametrize("case", CASES)
def test_block_reads_like_the_block_it_wraps(case):
    base = make_model(case)
    blocks = reference.submodules(base.base_model, reference.PARTS[base.config.model_type].blocks)
    model = make_badge(base=base)
    wrapped = blocks_of(model)
    assert [block.base_layer for block in wrapped] == blocks
    for block, original in zip(wrapped, blocks, strict=True):
        assert repr(block).startswith("badge.BadgeBlock(")
        assert block.get_base_layer() is original
        # some models read from their blocks; the attributes and submodules there are, by version
        for name in {*vars(original), *original._modules} - set(vars(nn.Module())):
            assert getattr(block, name) is getattr(original, name)
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = block.no_such_thing


def test_block_that_is_called_alone_is_the_block():
    model = make_badge(placement="ffn")
    block = blocks_of(model)[1]
    states = torch.randn(2, 5, HIDDEN)
    assert current_pass() is None
    found, expected = block(states), block.base_layer(states)  # tuples, before transformers 5
    assert type(found) is type(expected) and torch.equal(found[0], expected[0])


def test_hooks_are_as_few_as_the_placement_needs():
    def count(model: nn.Module) -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.get_base_model().bert.modules())

    before = count(get_peft_model(make_model(), BadgeConfig(placement="none")))
    wrapped = BLOCKS - 1  # block M answers with the model's own head
    for placement, each in (("block", 1), ("ffn", 2), ("mhsa", 2)):
        model = get_peft_model(make_model(), BadgeConfig(placement=placement))
        assert count(model) - before == each * wrapped
        model.add_adapter("other", BadgeConfig(placement=placement, r=2))
        assert count(model) - before == each * wrapped
    model.add_adapter("whole", BadgeConfig(placement="block", final_exit="exit"))
    assert count(model) - before == 2 * wrapped + 1
    for block in blocks_of(model):
        block.remove_hooks()
    assert count(model) == before


def test_blocks_cannot_be_merged():
    block = blocks_of(make_badge())[0]
    for call in (block.merge, block.unmerge):
        with pytest.raises(NotImplementedError, match=r"cannot be merged.*unload\(\)"):
            call()


def test_exit_layers_choose_the_blocks_with_an_exit():
    model = make_badge(exit_layers=[0, 2])
    blocks = blocks_of(model)
    has = {m: [block.has_exit("default", m) for block in blocks] for m in range(BLOCKS + 1)}
    none, first, second = [False] * 3, [True, False, False], [False, True, False]
    assert has == {0: first, 1: none, 2: second, 3: none}
    assert not blocks[0].has_exit("other", 0)
    # an exit on the embeddings has no bypass: there is no block before it
    assert {name.split(".")[1] for name in reference.own_weights(model) if name.startswith("bypass")} == {"2"}
    assert exits_of(model, make_batch()).shape == (4, 3, 3)
