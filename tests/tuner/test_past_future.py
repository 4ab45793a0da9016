"""Exit type `past_future` (Global Past-Future) against a loop over exits, written from the formulas:

past_i = sum_{j <= i} w_j v_j, future_i = sum_{j > i} w_j tanh(W_j v_i), lam_i = sigmoid(U tanh(mean_{j <= i} G_j v_j))
and logits_i = 2 lam_i past_i + (2 - 2 lam_i) future_i, where v_j is the pooled state behind a dense layer and tanh.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model

from badge_peft import BadgeConfig
from badge_peft.training.imitation import ImitationPass
from tests import reference
from tests.models import HIDDEN, LABELS, exits_of, make_badge, make_batch, make_labels, make_model
from tests.passes import full_depth
from tests.thresholds import in_a_gap

FIELDS = {"exit_type": "past_future", "final_exit": "exit"}


def vectors(base, model, batch, kind):
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


def all_logits(base, model, batch, kind):
    """[B, E, K]."""
    w, v = reference.own_weights(model), vectors(base, model, batch, kind)
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
def test_formulas(case, fields):
    base = make_model(case).double()
    model = make_badge(case, copy.deepcopy(base), **FIELDS, **fields)
    kind = fields.get("exit_pooling", "mean" if case == "modernbert-mean" else "cls")
    batch = make_batch()
    found = exits_of(model, batch)
    torch.testing.assert_close(found, all_logits(base, model, batch, kind), rtol=1e-10, atol=1e-10)
    assert torch.equal(model(**batch).logits, found[:, -1])


@pytest.mark.parametrize(
    ("exit_layers", "policy"),
    [(None, "entropy"), ([0, 1, 2, 3, 4, 5, 6], "divergence"), ([0, 2, 5], "max_prob")],
    ids=str,
)
@pytest.mark.parametrize("case", ["bert", "albert-groups", "deberta-v2"])
def test_early_exit(case, exit_layers, policy):
    """Each row's notes follow it: whoever leaves, the others get the logits that they have at full depth."""
    model = make_badge(
        case, make_model(case, num_hidden_layers=6).double(), exit_layers=exit_layers, **FIELDS
    ).double()
    numbers = model.base_model.exit_layers()
    batch = make_batch(rows=13, seed=7)
    full = exits_of(model, batch)
    rule = in_a_gap({"policy": policy}, full, numbers)
    out = model.early_exit_forward(**batch, early_exit_config=rule)
    assert len(out.exit_layer.unique()) >= 2
    index = torch.tensor([numbers.index(m) for m in out.exit_layer.tolist()])
    torch.testing.assert_close(out.logits, full[torch.arange(13), index], rtol=1e-8, atol=1e-8)


def test_rows_left_at_every_exit_above():
    """So the test above does compact, several times in one pass."""
    model = make_badge("bert", make_model(num_hidden_layers=6).double(), **FIELDS)
    batch = make_batch(rows=13, seed=7)
    rule = in_a_gap({"policy": "entropy"}, exits_of(model, batch), [1, 2, 3, 4, 5, 6])
    out = model.early_exit_forward(**batch, early_exit_config=rule)
    assert len(out.exit_layer.unique()) >= 4
    for row in range(13):  # and alone as together
        alone = model.early_exit_forward(**{k: v[row : row + 1] for k, v in batch.items()}, early_exit_config=rule)
        assert alone.exit_layer.tolist() == out.exit_layer[row : row + 1].tolist()
        torch.testing.assert_close(alone.logits[0], out.logits[row], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("exit_layers", "exits"), [(None, 3), ([0, 1, 2, 3], 4), ([2], 2)], ids=str)
@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-cls"])
def test_number_of_parameters(case, exit_layers, exits):
    model = get_peft_model(make_model(case), BadgeConfig(placement="none", exit_layers=exit_layers, **FIELDS))
    d, k = HIDDEN, LABELS
    # dense and W_j (d x d each), the gate d -> 32, the balance 32 -> K, and the linear layer
    each = 2 * (d * d + d) + (32 * d + 32) + (32 * k + k) + (k * d + k)
    assert model.get_nb_trainable_parameters()[0] == exits * each


def test_number_of_parameters_at_bert_base_size(capsys):
    base = make_model(hidden_size=768, num_attention_heads=12, intermediate_size=8, num_labels=2)
    model = get_peft_model(base, BadgeConfig(placement="none", **FIELDS))
    each = 2 * 590_592 + 24_608 + 66 + 1538
    assert model.get_nb_trainable_parameters()[0] == 3 * each
    model.print_trainable_parameters()
    assert f"trainable params: {3 * each:,}" in capsys.readouterr().out
    imitate = sum(p.numel() for name, p in model.named_parameters() if ".imitate." in name)
    assert imitate == 3 * 590_592  # 7.09 million for 12 exits, as the authors' own


def test_earlier_states_take_no_gradient():
    """Exit i trains w_j and G_j of the exits before it, W_j and w_j of those behind it, and no state but its own."""
    model = make_badge(**FIELDS, exit_layers=[0, 1, 2, 3]).double()
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


def test_dropout_drops_the_same_of_a_state_for_all_exits():
    """One mask for each v_j: what later exits see of it is what exit j saw."""
    model = make_badge(**FIELDS, exit_dropout=0.5, placement="none").train()
    block = model.base_model.wrapped[0]
    exit_ = block.own_exit("default", 1)
    seen = {"linear": [], "gate": []}
    for name, calls in seen.items():
        getattr(exit_, name).register_forward_pre_hook(lambda m, args, calls=calls: calls.append(args[0].detach()))
    model(**make_batch())
    assert len(seen["linear"]) == len(seen["gate"]) == 2
    assert all(torch.equal(x, seen["linear"][0]) for x in (*seen["linear"], *seen["gate"]))
    assert (seen["linear"][0] == 0).float().mean() > 0.3


def test_saved_and_loaded(tmp_path):
    model = make_badge(**FIELDS, exit_layers=[0, 2])
    before = exits_of(model, make_batch())
    model.save_pretrained(tmp_path)
    assert torch.equal(exits_of(PeftModel.from_pretrained(make_model(), tmp_path, "other"), make_batch()), before)


def test_two_adapters_have_exits_of_their_own():
    model = make_badge(**FIELDS)
    alone = exits_of(model, make_batch())
    model.add_adapter("other", BadgeConfig(exit_layers=[0, 1], **FIELDS))
    model.eval()
    assert torch.equal(exits_of(model, make_batch()), alone)
    model.set_adapter("other")
    assert exits_of(model, make_batch()).shape == (4, 3, 3)


@pytest.mark.parametrize("final_exit", ["base_head", None])
def test_exit_m_must_be_one_of_them(final_exit):
    fields = {} if final_exit is None else {"final_exit": final_exit}
    with pytest.raises(
        ValueError, match="exit_type='past_future' needs final_exit='exit': exit M is one of the exits"
    ):
        BadgeConfig(exit_type="past_future", **fields)


def test_vectors_are_kept_for_training_alone():
    model = make_badge(**FIELDS)
    state = full_depth(model, make_batch(), ImitationPass)[1].state
    assert sorted(state.vectors) == [0, 1, 2] and sorted(state.predictions) == [(0, 1), (0, 2), (1, 2)]
    state = full_depth(model, make_batch())[1].state
    assert not state.vectors and not state.predictions


def test_joint_training_moves_it():
    model = make_badge(**FIELDS)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(model.train()(**make_batch(), labels=make_labels()).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
