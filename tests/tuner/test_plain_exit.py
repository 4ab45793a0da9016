"""Which exits are nothing but their weights, and that these weights give what the modules give."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from badge_peft.early_exit.full_depth import FullDepthReader
from badge_peft.tuner.bypass import ACTIVATION_MODULES
from badge_peft.tuner.plain_exit import plain_exit
from tests.models import blocks_of, make_badge, make_batch
from tests.passes import full_depth


class Compared(FullDepthReader):
    """Reads every exit by its modules, and plain ones by their weights as well; `counts` says how many are plain."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counts = [0, 0]

    def read(self, block, number, frame):
        vector, logits = block.read_exit(self.exits, number, frame, self.pooling, self.state)
        bypass, norm = block.bypass_of(self.exits, number)
        exit_, placement = block.own_exit(self.exits.adapter, number), block.badge_placement[self.exits.adapter]
        plain = plain_exit(exit_, bypass, placement, block.layout.pre_norm, norm, frame)
        self.counts[plain is not None] += 1
        if plain is not None:
            inner = F.linear(self.pooling.pick(getattr(frame, plain.reads[0])), plain.down.weight, plain.down.bias)
            inner = inner if plain.activation is None else plain.activation(inner)
            residual = self.pooling.pick(getattr(frame, plain.reads[1]))
            states = plain.norm(F.linear(inner, plain.up.weight, plain.up.bias) + residual)
            torch.testing.assert_close(self.pooling.reduce(states), vector)
        return logits, None


def count(model, batch):
    """[exits that are the modules' work, plain exits]."""
    with torch.no_grad():
        return full_depth(model, batch, reader=Compared)[1].counts


GRID = list(itertools.product(("block", "ffn"), ("cls", "mean", "last")))


@pytest.mark.parametrize("case", ["bert", "albert", "deberta-v2", "modernbert-mean"])  # post-LN, shared, odd, pre-LN
@pytest.mark.parametrize(("placement", "pooling"), GRID)
def test_linear_exits_behind_a_bypass(case, placement, pooling):
    turn = GRID.index((placement, pooling))
    model = make_badge(
        case,
        placement=placement,
        exit_pooling=pooling,
        final_exit="exit",
        bias=bool(turn % 2),
        norm=("own", "shared")[turn % 3 == 0],
        activation=sorted(ACTIVATION_MODULES)[turn % len(ACTIVATION_MODULES)],
        exit_layers=[0, 1, 2],
    )
    exits = len(model.base_model.exit_layers())
    assert count(model, make_batch()) == [1, exits - 1]  # that on the embeddings has no bypass


@pytest.mark.parametrize("activation", sorted(ACTIVATION_MODULES))
def test_every_activation(activation):
    assert count(make_badge(activation=activation), make_batch()) == [0, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"placement": "mhsa"},
        {"placement": "none"},
        {"exit_type": "pooled"},
        {"exit_type": "mha"},
        {"exit_type": "past_future", "final_exit": "exit"},
        {"exit_type": "shared_pooled"},
    ],
)
def test_what_is_left_to_the_modules(fields):
    assert count(make_badge(**fields), make_batch())[1] == 0


def test_dropout_that_is_on():
    model = make_badge()
    blocks_of(model)[0].own_exit("default", 1).dropout.train()  # as Monte-Carlo dropout does
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", lambda x, *args, **kwargs: x)
        assert count(model, make_batch()) == [1, 1]


@pytest.mark.parametrize("part", ["linear", "dropout", "down", "activation", "up", "norm", "exit", "bypass"])
@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward", "class"])
def test_a_module_that_somebody_changed(part, change):
    model = make_badge()
    block = blocks_of(model)[0]
    exit_, bypass = block.own_exit("default", 1), block.badge_bypass["default"]["1"]
    owner = exit_ if part in ("linear", "dropout", "exit") else bypass
    module = owner if part in ("exit", "bypass") else getattr(owner, part)
    if change == "hook":
        module.register_forward_hook(lambda *_: None)
    elif change == "pre-hook":
        module.register_forward_pre_hook(lambda *_: None)
    elif change == "forward":
        own = module.forward
        module.forward = lambda *args, **kwargs: own(*args, **kwargs)
    else:
        module.__class__ = type("Other", (type(module),), {})
    assert count(model, make_batch()) == [1, 1]


def test_a_backbone_in_another_precision():
    model = make_badge()
    for name, parameter in model.named_parameters():
        if ".badge_" not in name:
            parameter.data = parameter.data.bfloat16()
    assert count(model, make_batch()) == [2, 0]
    assert count(model.bfloat16(), make_batch()) == [0, 2]
