"""The bypass alone, and with placement `mhsa`, where the FFN runs a second time for the exit:

H'_MHA = LN_attn( B(H_{m-1}) + attention output + H_{m-1} ), then H'_m = LN'( FFN(H'_MHA) + H'_MHA ).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from badge_peft import Bypass
from tests.models import (
    BLOCKS,
    HIDDEN,
    blocks_of,
    exits_of,
    make_badge,
    make_batch,
    shake,
)

SOME = ("bert", "albert", "distilbert", "deberta-v2", "modernbert-cls")  # whose FFNs are called in different ways


def test_bypass_alone():
    bypass = Bypass(HIDDEN, 4, "identity", bias=False, norm=nn.LayerNorm(HIDDEN))
    shake(bypass, only="")
    source, residual = torch.randn(2, 5, HIDDEN), torch.randn(2, 5, HIDDEN)
    expected = bypass.norm(source @ bypass.down.weight.T @ bypass.up.weight.T + residual)
    torch.testing.assert_close(bypass(source, residual), expected)


def test_copied_norm_has_no_hooks_of_the_norm_it_copies():
    norm = nn.LayerNorm(HIDDEN).requires_grad_(False)
    calls = []
    norm.register_forward_pre_hook(lambda *_: calls.append("before"))
    norm.register_forward_hook(lambda *_: calls.append("after"))
    bypass = Bypass(HIDDEN, 4, "gelu", bias=False, norm=norm)
    bypass(torch.randn(2, HIDDEN), torch.randn(2, HIDDEN))
    assert not calls
    assert bypass.norm.weight.requires_grad and not norm.weight.requires_grad


def ffn_shapes(model):
    """Shapes of what enters the first part of each block's FFN, in order."""
    shapes = []
    for block in blocks_of(model):
        first = block.base_layer.get_submodule(block.layout.ffn[0])
        first.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.parametrize(
    ("pooling", "second"), [("cls", (4, HIDDEN)), ("last", (4, HIDDEN)), ("mean", (4, 8, HIDDEN))]
)
@pytest.mark.parametrize("case", SOME)
def test_one_position_goes_through_the_second_ffn(case, pooling, second):
    model = make_badge(case, placement="mhsa", exit_pooling=pooling, final_exit="exit")
    shapes = ffn_shapes(model)
    exits_of(model, make_batch())
    assert shapes == [(4, 8, HIDDEN), second] * model.base_model.num_blocks


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({}, [1, 2]),  # exit M is the model's own head
        ({"final_exit": "exit"}, [1, 2, 3]),
        ({"exit_layers": [2]}, [2]),
        ({"exit_layers": [0, 1], "final_exit": "exit"}, [1, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("placement", ["mhsa", "block", "ffn", "none"])
def test_only_an_exit_runs_the_ffn_again_and_only_here(placement, fields, extra):
    model = make_badge(placement=placement, exit_pooling="cls", **fields)
    shapes = ffn_shapes(model)
    exits_of(model, make_batch())
    expected = []
    for number in range(1, BLOCKS + 1):
        expected += [(4, 8, HIDDEN)] + [(4, HIDDEN)] * (placement == "mhsa" and number in extra)
    assert shapes == expected
    shapes.clear()
    with model.disable_adapter(), torch.no_grad():
        model(**make_batch())
    assert shapes == [(4, 8, HIDDEN)] * BLOCKS
