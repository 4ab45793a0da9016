"""Exits: linear, pooled, attention (against torch's own), and past_future
(Global Past-Future) against a loop over exits, written from the formulas:

past_i = sum_{j <= i} w_j v_j, future_i = sum_{j > i} w_j tanh(W_j v_i), lam_i = sigmoid(U tanh(mean_{j <= i} G_j v_j))
and logits_i = 2 lam_i past_i + (2 - 2 lam_i) future_i, where v_j is the pooled state behind a dense layer and tanh.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from badge_peft import BadgeConfig, MultiExitHead
from badge_peft.tuner.config import CHOICES
from badge_peft.tuner.exits import EXITS, AttentionExit
from badge_peft.tuner.pooling import Pooling
from tests import reference
from tests.models import HIDDEN, exits_of, make_badge, make_batch, make_model

STATES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_attention_beside_the_mean_begins_as_a_linear_exit():
    exit_, pooling = EXITS["residual_mha"](8, 3, 0.0), Pooling("mean", MASK)
    assert torch.equal(exit_.represent(STATES, pooling), pooling.reduce(STATES))


@pytest.mark.parametrize("exit_type", ["linear", "pooled", "mha"])
def test_dropout_only_in_training(exit_type):
    exit_ = EXITS[exit_type](8, 3, 0.5)
    vector = torch.ones(64, 8)
    assert len(exit_.train()(vector).unique(dim=0)) > 1
    torch.testing.assert_close(exit_.eval()(vector), exit_.linear(vector), rtol=0, atol=0)
    torch.manual_seed(1)
    first = exit_.train()(vector)
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(vector, 0.5)
    torch.testing.assert_close(first, exit_.linear(kept), rtol=0, atol=0)


@pytest.mark.parametrize("exit_type", CHOICES["exit_type"])
def test_one_exit_for_each_number(exit_type):
    head = MultiExitHead([0, 1, 5], exit_type, 8, 3, 0.1)
    assert list(head) == ["0", "1", "5"]
    assert len({id(p) for p in head.parameters()}) == 3 * len(list(head.exit(5).parameters()))
    assert head.exit(5) is head["5"] and type(head.exit(5)) is EXITS[exit_type]
    assert head.exit(0).dropout.p == 0.1
    with pytest.raises(KeyError):
        head.exit(2)


def test_attention_exit_needs_a_mask_of_two_dimensions():
    exit_ = EXITS["mha"](8, 3, 0.0)
    with pytest.raises(ValueError, match=r"an exit with attention needs .* \[batch, sequence\], got \[2, 1, 1, 5\]"):
        exit_.represent(STATES, Pooling("cls", MASK[:, None, None, :]))


# ----------------------------------------------------------------------------------------------------------- attention


POOLINGS = ("cls", "mean", "last")
B, S, K = 4, 6, 3
ATTENTION_MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 6, [1] * 5 + [0], [1] * 2 + [0] * 4, [1] + [0] * 5]),
    "left": torch.tensor([[1] * 6, [0] + [1] * 5, [0] * 4 + [1] * 2, [0] * 5 + [1]]),
    "holes": torch.tensor([[1] * 6, [1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0]]),
}


def make_attention(size):
    torch.manual_seed(size)
    return AttentionExit(size, K, 0.0).double().eval()


def make_states(size):
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


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("mask", ATTENTION_MASKS)
@torch.no_grad()
def test_attention_against_torchs(mask, kind):
    """Against loops: `tests/reference.py`, in test_layer.py."""
    exit_, x, mask = make_attention(32), make_states(32), ATTENTION_MASKS[mask]
    pooling = Pooling(kind, mask)
    vector = exit_.represent(x, pooling)
    expected = reference.pool(by_torch(exit_, x, torch.ones(B, S) if mask is None else mask), _all(mask), kind)
    assert vector.shape == (B, 32)
    torch.testing.assert_close(vector, expected, rtol=1e-10, atol=1e-12)
    logits = expected @ exit_.linear.weight.T + exit_.linear.bias
    torch.testing.assert_close(exit_(vector), logits, rtol=1e-10, atol=1e-12)


def _all(mask):
    return torch.ones(B, S, dtype=torch.long) if mask is None else mask


@pytest.mark.parametrize("kind", POOLINGS)
def test_attention_to_padding_alone_is_no_nan(kind):
    exit_, x = make_attention(32), make_states(32)
    mask = ATTENTION_MASKS["right"].clone()
    expected = exit_.represent(x, Pooling(kind, mask))
    mask[1] = 0
    found = exit_.represent(x, Pooling(kind, mask))
    assert found.isfinite().all()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize(("kind", "positions"), [("cls", ()), ("last", ()), ("mean", (S,))])
def test_in_attention_only_the_picked_position_asks(kind, positions):
    exit_, seen = make_attention(24), {}
    for name in ("query", "key", "value", "output"):
        getattr(exit_, name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].shape}))
    exit_.represent(make_states(24), Pooling(kind, ATTENTION_MASKS["right"]))
    assert seen["query"] == (B, *positions, 24)
    assert seen["key"] == seen["value"] == (B, S, 24)
    assert seen["output"] == (B, 32)  # after the mean, which a layer without bias lets through


# ----------------------------------------------------------------------------------------------------- past and future


PAST_FUTURE = {"exit_type": "past_future", "final_exit": "exit"}


def past_future_vectors(base, model, batch, kind):
    """v_j [B, d] by block number: the plain reference's pooled states, through each exit's dense layer."""
    weights, config = reference.own_weights(model), model.peft_config["default"]
    states, _ = reference.trace(base, batch)
    eye = {"linear.weight": torch.eye(HIDDEN).double(), "linear.bias": torch.zeros(HIDDEN).double()}
    found = {}
    for j in model.base_model.exit_layers():
        w = {name: p for name, p in weights.items() if name.startswith("bypass.")}
        w.update({f"exit.{j}.{name}": p for name, p in eye.items()})  # the pooled state itself
        plain = replace(config, exit_type="linear", modules_to_save=None, target_modules=None)
        state = reference.exit_logits(base, plain, w, states, j, batch["attention_mask"], kind)
        dense, bias = (weights[f"exit.{j}.dense.{name}"] for name in ("weight", "bias"))
        found[j] = torch.tanh(state @ dense.T + bias)
    return found


def apply(weights, j, name, x):
    return x @ weights[f"exit.{j}.{name}.weight"].T + weights[f"exit.{j}.{name}.bias"]


def past_future_logits(base, model, batch, kind):
    """[B, E, K]."""
    w, v = reference.own_weights(model), past_future_vectors(base, model, batch, kind)
    logits = []
    for i in v:
        up_to_i = [j for j in v if j <= i]
        past = sum(apply(w, j, "linear", v[j]) for j in up_to_i)
        future = sum(apply(w, j, "linear", torch.tanh(apply(w, j, "imitate", v[i]))) for j in v if j > i)
        gates = sum(apply(w, j, "gate", v[j]) for j in up_to_i) / len(up_to_i)
        lam = 1 / (1 + torch.exp(-apply(w, i, "balance", torch.tanh(gates))))
        logits.append(2 * lam * past + (2 - 2 * lam) * future)
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"exit_layers": [0, 1, 2], "placement": "none", "exit_pooling": "mean"},
        {"exit_layers": [0, 2], "placement": "mhsa", "exit_pooling": "last"},
        {"exit_layers": [3], "placement": "ffn", "exit_pooling": "cls"},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-mean"])
@torch.no_grad()
def test_past_future_formulas(case, fields):
    base = make_model(case).double()
    model = make_badge(case, copy.deepcopy(base), **PAST_FUTURE, **fields)
    kind = fields.get("exit_pooling", "mean" if case == "modernbert-mean" else "cls")
    batch = make_batch()
    found = exits_of(model, batch)
    torch.testing.assert_close(found, past_future_logits(base, model, batch, kind), rtol=1e-10, atol=1e-10)
    assert torch.equal(model(**batch).logits, found[:, -1])


def test_past_future_number_of_parameters_at_bert_base_size(capsys):
    base = make_model(hidden_size=768, num_attention_heads=12, intermediate_size=8, num_labels=2)
    model = get_peft_model(base, BadgeConfig(placement="none", **PAST_FUTURE))
    each = 2 * 590_592 + 24_608 + 66 + 1538
    assert model.get_nb_trainable_parameters()[0] == 3 * each - 590_592
    model.print_trainable_parameters()
    assert f"trainable params: {3 * each - 590_592:,}" in capsys.readouterr().out
    imitate = sum(p.numel() for name, p in model.named_parameters() if ".imitate." in name)
    assert imitate == 2 * 590_592  # 6.5 million for 12 exits: the authors' own, but for that of the first


def test_past_future_earlier_states_take_no_gradient():
    """Exit i trains w_j and G_j of the exits before it, W_j and w_j of those behind it, and no state but its own."""
    model = make_badge(**PAST_FUTURE, exit_layers=[0, 1, 2, 3]).double()
    parameters = reference.own_weights(model)
    for place, i in enumerate([0, 1, 2, 3]):
        model.zero_grad()
        model(**make_batch()).exit_logits[:, place].square().sum().backward()
        moved = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
        kinds = ("dense", "imitate", "gate", "balance", "linear")
        found = {j: {kind for kind in kinds if f"exit.{j}.{kind}.weight" in moved} for j in (0, 1, 2, 3)}
        assert found[i] == {"dense", "gate", "balance", "linear"}
        assert all(found[j] == {"gate", "linear"} for j in range(i))
        assert all(found[j] == {"imitate", "linear"} for j in range(i + 1, 4))
        assert {name.split(".")[1] for name in moved if name.startswith("bypass.")} == ({str(i)} if i else set())


def test_past_future_dropout_drops_the_same_of_a_state_for_all_exits():
    """One mask for each v_j: what later exits see of it is what exit j saw."""
    model = make_badge(**PAST_FUTURE, exit_dropout=0.5, placement="none").train()
    block = model.base_model.wrapped[0]
    exit_ = block.own_exit("default", 1)
    seen = {"linear": [], "gate": []}
    for name, calls in seen.items():
        getattr(exit_, name).register_forward_pre_hook(lambda m, args, calls=calls: calls.append(args[0].detach()))
    model(**make_batch())
    assert len(seen["linear"]) == len(seen["gate"]) == 2
    assert all(torch.equal(x, seen["linear"][0]) for x in (*seen["linear"], *seen["gate"]))
    assert (seen["linear"][0] == 0).float().mean() > 0.3
