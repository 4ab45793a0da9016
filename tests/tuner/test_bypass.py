"""The bypass alone, and with placement `mhsa`, where the FFN runs a second time for the exit:

H'_MHA = LN_attn( B(H_{m-1}) + attention output + H_{m-1} ), then H'_m = LN'( FFN(H'_MHA) + H'_MHA ).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from badge_peft import ARCHITECTURES, Bypass
from tests import reference
from tests.design import pairs
from tests.models import (
    BLOCKS,
    CASES,
    HIDDEN,
    blocks_of,
    exits_of,
    make_badge,
    make_batch,
    make_labels,
    make_model,
    shake,
)
from tests.thresholds import in_a_gap

POOLINGS = ("cls", "mean", "last")
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


def second_pass(base, model, states, number):
    """H'_m [B, S, d], by the formula alone."""
    parts = reference.PARTS[base.config.model_type]
    block, seen = states[number - 1].block, states[number - 1]
    w = reference.own_weights(model)
    w = {name: w[f"bypass.{number}.{name}"] for name in ("down.weight", "up.weight")}
    inner = seen.block_input @ w["down.weight"].T
    bypass = (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ w["up.weight"].T  # Eq. 1, gelu
    if parts.last_norm is None:  # pre-LN: the FFN normalizes its own input
        state = bypass + seen.attention  # H_{m-1} + attention output
        state = parts.ffn(block, state) + state
    else:
        ln = block.get_submodule(parts.attention_norm)
        state = reference.layer_norm(bypass + seen.attention_sum, ln.weight, ln.bias, ln.eps)
        state = parts.ffn(block, state) + state
    ln = reference.exit_norm(base, block)
    own = reference.own_weights(model)
    return reference.layer_norm(
        state, own[f"bypass.{number}.norm.weight"], own.get(f"bypass.{number}.norm.bias"), ln.eps
    )


@pytest.mark.parametrize("case", CASES)
def test_formula(case):
    base = make_model(case).double()
    plain = copy.deepcopy(base)
    model = make_badge(base=base, placement="mhsa", final_exit="exit")
    weights = reference.own_weights(model)
    for pooling, side in zip(POOLINGS, ("right", "left", "left"), strict=True):
        batch = make_batch(side=side)
        with torch.no_grad():
            states, logits = reference.trace(plain, batch)
            expected = []
            for number in range(1, len(states) + 1):
                state = second_pass(plain, model, states, number)
                vector = reference.pool(state, batch["attention_mask"], pooling)
                expected.append(
                    vector @ weights[f"exit.{number}.linear.weight"].T + weights[f"exit.{number}.linear.bias"]
                )
            model.peft_config["default"].exit_pooling = pooling
            found = model(**batch, output_hidden_states=True)
            untouched = plain(**batch, output_hidden_states=True)
        torch.testing.assert_close(found.exit_logits, torch.stack(expected, dim=1), rtol=1e-10, atol=1e-10)
        assert all(map(torch.equal, found.hidden_states, untouched.hidden_states))  # H_m, bit for bit
        assert len(found.hidden_states) > len(states) - 1
        assert torch.equal(untouched.logits, logits)


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


@pytest.mark.parametrize(("case", "pooling", "final_exit"), pairs(SOME, POOLINGS, ("base_head", "exit")))
def test_early_exit(case, pooling, final_exit):
    """Rows that leave at different blocks get the logits that full depth has there, and the survivors' FFN alone is
    run again."""
    layers = "n_layers" if case == "distilbert" else "num_hidden_layers"
    base = make_model(case, **{layers: 4}).double()
    model = make_badge(base=base, placement="mhsa", exit_pooling=pooling, final_exit=final_exit)
    batch = make_batch(rows=9, seed=5)
    full, numbers = exits_of(model, batch), model.base_model.exit_layers()
    rule = in_a_gap({"policy": "entropy"}, full, numbers)
    model.early_exit_forward(**make_batch(), policy="never")
    shapes = ffn_shapes(model)
    out = model.early_exit_forward(**batch, early_exit_config=rule)
    assert len(out.exit_layer.unique()) >= 2
    index = torch.tensor([numbers.index(m) for m in out.exit_layer.tolist()])
    torch.testing.assert_close(out.logits, full[torch.arange(9), index], rtol=1e-9, atol=1e-9)
    expected = []
    lengths = batch["attention_mask"].sum(dim=1)
    for number in numbers:
        left = out.exit_layer >= number
        if not left.any():
            break
        whole = left.all() or number <= ARCHITECTURES[base.config.model_type].full_rows_until
        rows, length = (9, 8) if whole else (int(left.sum()), int(lengths[left].max()))
        second = (rows, HIDDEN) if pooling != "mean" else (rows, length, HIDDEN)
        expected += [(rows, length, HIDDEN)] + [second] * (number < numbers[-1] or final_exit == "exit")
    assert shapes == expected


def test_the_second_pass_has_a_gradient_of_its_own():
    """Exit m alone: its gradient reaches the FFN of block m by the second pass, and nothing of block m + 1."""
    model = make_badge(placement="mhsa", backbone="full", final_exit="exit", exit_dropout=0.0)
    logits = model.train()(**make_batch()).exit_logits[:, 1]
    torch.nn.functional.cross_entropy(logits, make_labels()).backward()
    for number, block in enumerate(blocks_of(model), start=1):
        parts = ("intermediate.dense", "output.dense", "attention.output.LayerNorm", "output.LayerNorm")
        gradients = [block.base_layer.get_submodule(part).weight.grad for part in parts]
        found = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert found == [number <= 2] * 3 + [number <= 1]
