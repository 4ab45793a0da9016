"""The multi-head attention exit against torch's own attention and against a loop over heads and positions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from badge_peft.tuner.exits import AttentionExit
from badge_peft.tuner.pooling import Pooling
from tests import reference
from tests.models import BLOCKS, make_badge, make_batch, make_labels

POOLINGS = ("cls", "mean", "last")
B, S, K = 4, 6, 3
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 6, [1] * 5 + [0], [1] * 2 + [0] * 4, [1] + [0] * 5]),
    "left": torch.tensor([[1] * 6, [0] + [1] * 5, [0] * 4 + [1] * 2, [0] * 5 + [1]]),
    "holes": torch.tensor([[1] * 6, [1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0]]),
}


def make_exit(size):
    torch.manual_seed(size)
    return AttentionExit(size, K, 0.0).double().eval()


def states(size):
    return torch.randn(B, S, size, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def by_torch(exit_, x, mask):
    """[B, S, d] by torch.nn.functional.multi_head_attention_forward, which wants d = 32 here."""
    q, k, v, out = (getattr(exit_, name).weight for name in ("query", "key", "value", "output"))
    x = x.transpose(0, 1)
    mixed, _ = F.multi_head_attention_forward(
        x, x, x, 32, 2, None, None, None, None, False, 0.0, out, None, training=False,
        key_padding_mask=None if mask is None else mask == 0, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=q, k_proj_weight=k, v_proj_weight=v,
    )  # fmt: skip
    return mixed.transpose(0, 1)


def by_loop(exit_, x, mask):
    """[B, S, d], number by number."""
    q, k, v = (x @ getattr(exit_, name).weight.T for name in ("query", "key", "value"))
    mixed = torch.zeros_like(q)
    for b in range(B):
        real = [s for s in range(S) if mask is None or mask[b, s]]
        for head in (slice(0, 16), slice(16, 32)):
            for s in range(S):
                scores = [math.exp((q[b, s, head] * k[b, t, head]).sum() / 4) for t in real]
                for score, t in zip(scores, real, strict=True):
                    mixed[b, s, head] += score / sum(scores) * v[b, t, head]
    return mixed @ exit_.output.weight.T


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("attend", "size"), [(by_torch, 32), (by_loop, 32), (by_loop, 24), (by_loop, 40)])
@torch.no_grad()
def test_attention(attend, size, mask, kind):
    exit_, x, mask = make_exit(size), states(size), MASKS[mask]
    pooling = Pooling(kind, mask)
    vector = exit_.represent(x, pooling)
    expected = reference.pool(attend(exit_, x, torch.ones(B, S) if mask is None else mask), _all(mask), kind)
    assert vector.shape == (B, size)
    torch.testing.assert_close(vector, expected, rtol=1e-10, atol=1e-12)
    logits = expected @ exit_.linear.weight.T + exit_.linear.bias
    torch.testing.assert_close(exit_(vector), logits, rtol=1e-10, atol=1e-12)


def _all(mask):
    return torch.ones(B, S, dtype=torch.long) if mask is None else mask


@pytest.mark.parametrize("kind", POOLINGS)
def test_heads_do_not_mix(kind):
    """With a single head of width 32 in place of two of 16 the numbers are others."""
    exit_, x = make_exit(32), states(32)
    two = exit_.represent(x, Pooling(kind, None))
    exit_.HEADS = 1
    assert not torch.allclose(exit_.represent(x, Pooling(kind, None)), two)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32])
@pytest.mark.parametrize("kind", POOLINGS)
def test_kinds_of_mask(kind, dtype):
    exit_, x = make_exit(32), states(32)
    expected = exit_.represent(x, Pooling(kind, MASKS["right"]))
    assert torch.equal(exit_.represent(x, Pooling(kind, MASKS["right"].to(dtype))), expected)
    assert not torch.allclose(exit_.represent(x, Pooling(kind, None)), expected)


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_row_of_padding_alone_is_no_nan(kind):
    exit_, x = make_exit(32), states(32)
    mask = MASKS["right"].clone()
    expected = exit_.represent(x, Pooling(kind, mask))
    mask[1] = 0
    found = exit_.represent(x, Pooling(kind, mask))
    assert found.isfinite().all()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize(("kind", "positions"), [("cls", ()), ("last", ()), ("mean", (S,))])
def test_only_the_picked_position_asks(kind, positions):
    exit_, seen = make_exit(24), {}
    for name in ("query", "key", "value", "output"):
        getattr(exit_, name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].shape}))
    exit_.represent(states(24), Pooling(kind, MASKS["right"]))
    assert seen["query"] == (B, *positions, 24)
    assert seen["key"] == seen["value"] == (B, S, 24)
    assert seen["output"] == (B, *positions, 32)


@pytest.mark.parametrize("num_labels", [1, 2, 77])
def test_number_of_parameters(num_labels):
    exit_ = AttentionExit(768, num_labels, 0.1)
    assert sum(p.numel() for p in exit_.parameters()) == 98_304 + num_labels * 769
    sizes = {name: tuple(p.shape) for name, p in exit_.named_parameters() if not name.startswith("linear")}
    assert sizes == {
        "query.weight": (32, 768),
        "key.weight": (32, 768),
        "value.weight": (32, 768),
        "output.weight": (768, 32),
    }


# ---------------------------------------------------------------------------------------------------------- in a model


def test_gradients_reach_every_part():
    model = make_badge(exit_type="mha", final_exit="exit").train()
    model(**make_batch(), labels=make_labels()).loss.backward()
    gradients = {name: p.grad for name, p in reference.own_weights(model).items() if name.startswith("exit.")}
    assert len(gradients) == BLOCKS * 6
    assert all(gradient.any() for gradient in gradients.values())
