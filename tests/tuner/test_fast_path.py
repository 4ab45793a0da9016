"""The straight line of `fast_path.py` gives what the modules give, to the last bit, and steps aside where it must."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from badge_peft.early_exit.full_depth import FullDepthReader
from badge_peft.tuner import layer
from badge_peft.tuner.bypass import ACTIVATION_MODULES
from badge_peft.tuner.fast_path import fast_exit
from tests.models import blocks_of, make_badge, make_batch
from tests.passes import full_depth


class Compared(FullDepthReader):
    """Reads every exit both ways; `counts` says how often the straight line was taken."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counts = [0, 0]

    def read(self, block, number, frame):
        found, left = [], dict(self.state.left)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "fast_exit", lambda *args: found.append(fast_exit(*args)) or found[0])
            vector, logits = block.read_exit(self.exits, number, frame, self.pooling, self.state)
            fast = bool(found) and found[0] is not None
            if fast:
                patch.setattr(layer, "fast_exit", lambda *args: None)
                self.state.left = left  # both build on what the exits before have left
                by_modules = block.read_exit(self.exits, number, frame, self.pooling, self.state)
                assert torch.equal(vector, by_modules[0]) and torch.equal(logits, by_modules[1])
        self.counts[fast] += 1
        return logits, None


def count(model, batch, grad=False):
    """[exits that the modules computed, exits that the straight line computed]."""
    with torch.set_grad_enabled(grad):
        return full_depth(model, batch, reader=Compared)[1].counts


GRID = list(itertools.product(("block", "ffn", "none"), ("linear", "pooled"), ("cls", "mean", "last")))


@pytest.mark.parametrize("case", ["bert", "albert", "deberta-v2", "modernbert-mean"])  # post-LN, shared, odd, pre-LN
@pytest.mark.parametrize(("placement", "exit_type", "pooling"), GRID)
def test_it_is_the_modules_to_the_last_bit(case, placement, exit_type, pooling):
    turn = GRID.index((placement, exit_type, pooling))
    model = make_badge(
        case,
        placement=placement,
        exit_type=exit_type,
        exit_pooling=pooling,
        final_exit="exit",
        bias=bool(turn % 2),
        norm=("own", "shared")[turn % 3 == 0],
        activation=sorted(ACTIVATION_MODULES)[turn % len(ACTIVATION_MODULES)],
        exit_layers=[0, 1, 2],
        carry=(None, "logits")[turn % 2],
    )
    by_modules, fused = count(model, make_batch())
    exits = len(model.base_model.exit_layers())
    skips_norm = placement == "none" and model.base_model.layout.pre_norm
    assert (by_modules, fused) == ((exits - 1, 1) if skips_norm else (0, exits))


@pytest.mark.parametrize("activation", sorted(ACTIVATION_MODULES))
def test_every_activation(activation):
    assert count(make_badge(activation=activation), make_batch()) == [0, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"placement": "mhsa"},
        {"exit_type": "mha"},
        {"exit_type": "past_future"},
        {"exit_type": "shared_pooled"},
        {"ladder": True},
        {"carry": "states"},
    ],
)
def test_what_it_leaves_to_the_modules(fields):
    kind = {"final_exit": "exit"} if fields.get("exit_type") == "past_future" else {}
    fused = count(make_badge(**fields, **kind), make_batch())[1]
    assert fused == 0


def test_training_goes_through_the_modules():
    model = make_badge(exit_dropout=0.0)
    assert count(model, make_batch(), grad=True) == [2, 0]
    assert count(model.train(), make_batch()) == [2, 0]
    model.eval()
    blocks_of(model)[0].own_exit("default", 1).dropout.train()  # as Monte-Carlo dropout does
    assert count(model, make_batch()) == [1, 1]


@pytest.mark.parametrize("part", ["linear", "dropout", "down", "activation", "up", "norm", "exit", "bypass"])
@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward", "class"])
def test_a_module_that_somebody_changed_is_called(part, change):
    model = make_badge()
    block = blocks_of(model)[0]
    exit_, bypass = block.own_exit("default", 1), block.badge_bypass["default"]["1"]
    owner = exit_ if part in ("linear", "dropout", "exit") else bypass
    module = owner if part in ("exit", "bypass") else getattr(owner, part)
    called = []
    if change == "hook":
        module.register_forward_hook(lambda *_: called.append(1))
    elif change == "pre-hook":
        module.register_forward_pre_hook(lambda *_: called.append(1))
    elif change == "forward":
        own = module.forward
        module.forward = lambda *args, **kwargs: called.append(1) or own(*args, **kwargs)
    else:
        kind = type(module)

        class Other(kind):
            def forward(self, *args, **kwargs):
                called.append(1)
                return super().forward(*args, **kwargs)

        module.__class__ = Other
    assert count(model, make_batch()) == [1, 1]
    assert called


def test_under_autocast(monkeypatch):
    """On a GPU autocast has products in bfloat16 and LayerNorms in float32, on a CPU these in what they are given."""
    model, batch = make_badge(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert count(model, batch) == [2, 0]
        whole = functional.layer_norm
        monkeypatch.setattr(functional, "layer_norm", lambda states, *args: whole(states.float(), *args))
        assert count(model, batch) == [2, 0]


def test_a_backbone_in_another_precision():
    model = make_badge()
    for name, parameter in model.named_parameters():
        if ".badge_" not in name:
            parameter.data = parameter.data.bfloat16()
    assert count(model, make_batch()) == [2, 0]
    assert count(model.bfloat16(), make_batch()) == [0, 2]


def test_weights_that_are_replaced_count_at_once():
    model = make_badge()
    batch = make_batch()
    with torch.no_grad():
        before = model(**batch).exit_logits
        blocks_of(model)[0].own_exit("default", 1).linear = nn.Linear(32, 3)
        after = model(**batch).exit_logits
    assert not torch.equal(before[:, 0], after[:, 0]) and torch.equal(before[:, 1:], after[:, 1:])


def test_a_trace_is_that_of_the_modules() -> None:
    """torch traces with gradients and checks the trace without them."""
    model, batch = make_badge(), make_batch()
    traced = torch.jit.trace(model, (batch["input_ids"], batch["attention_mask"]), strict=False)
    with torch.no_grad():
        found, expected = traced(batch["input_ids"], batch["attention_mask"]), model(**batch)
    torch.testing.assert_close(found["exit_logits"], expected.exit_logits)
