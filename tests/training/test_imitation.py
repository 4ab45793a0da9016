"""The imitation loss of Global Past-Future by hand, and what a pass keeps for it."""

from __future__ import annotations

import math

import pytest
import torch

from badge_peft.training.passes import ImitationPass, imitation_loss
from badge_peft.tuner.exits import ExitState
from tests import reference
from tests.models import make_badge, make_batch
from tests.passes import full_depth

FIELDS = {"exit_type": "past_future", "final_exit": "exit"}


def kept(model):
    return full_depth(model, make_batch(), ImitationPass)[1].state


def distance(a, b):
    """1 - cos(a, b), the mean over rows."""
    rows = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        rows.append(1 - dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y)))
    return sum(rows) / len(rows)


@pytest.mark.parametrize(("exit_layers", "count"), [(None, 3), ([0, 1, 2, 3], 4), ([2], 2)], ids=str)
def test_mean_over_exits_of_the_mean_over_those_behind(exit_layers, count):
    state = kept(make_badge(**FIELDS, exit_layers=exit_layers))
    assert sorted(state.vectors) == list(range(count))
    assert sorted(state.predictions) == [(i, j) for i in range(count) for j in range(i + 1, count)]
    each = [
        sum(distance(state.predictions[i, j], state.vectors[j]) for j in range(i + 1, count)) / (count - 1 - i)
        for i in range(count - 1)
    ]
    assert imitation_loss(state).mean().item() == pytest.approx(sum(each) / len(each), rel=1e-5)
    if count > 2:  # it is not the mean over all pairs
        pairs = [distance(g, state.vectors[j]) for (_, j), g in state.predictions.items()]
        assert abs(sum(pairs) / len(pairs) - sum(each) / len(each)) > 1e-4


def test_predictions_are_tanh_w_j_v_i():
    model = make_badge(**FIELDS)
    state, w = kept(model), reference.own_weights(model)
    for (i, j), prediction in state.predictions.items():
        weight, bias = (w[f"exit.{j + 1}.imitate.{name}"] for name in ("weight", "bias"))
        torch.testing.assert_close(prediction, torch.tanh(state.vectors[i] @ weight.T + bias))


def test_only_the_prediction_learns_from_it():
    """W_j and v_i take gradients, the real v_j none."""
    model = make_badge(**FIELDS)
    imitation_loss(kept(model)).mean().backward()
    moved = {name for name, p in reference.own_weights(model).items() if p.grad is not None and p.grad.any()}
    assert {name for name in moved if name.startswith("exit.")} == {
        f"exit.{m}.{part}.{kind}"
        for m, part in ((1, "dense"), (2, "dense"), (2, "imitate"), (3, "imitate"))
        for kind in ("weight", "bias")
    }


def test_exits_that_make_no_predictions():
    with pytest.raises(ValueError, match=r"objective='past_future' needs BadgeConfig\(exit_type='past_future'"):
        imitation_loss(ExitState([]))
    with pytest.raises(ValueError, match="objective='past_future' needs"):
        make_badge()(**make_batch(), exit_pass=ImitationPass)


def test_it_is_in_the_output_of_its_pass_alone():
    model = make_badge(**FIELDS)
    found = model(**make_batch(), exit_pass=ImitationPass).imitation_loss
    assert torch.equal(found, imitation_loss(kept(model))) and found.shape == (4,)
    assert model(**make_batch()).imitation_loss is None
