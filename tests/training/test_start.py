"""Exits start as regressions on what they read: as scikit-learn's, for every kind of problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tests.models import exits_of

from .runs import PROBLEMS, Rows, make, make_trainer, weights


def started(path, model, data, **options):
    """The model as a training of no step leaves it, but for the start."""
    options = {"max_steps": 1, "adapter_learning_rate": 0.0, "per_device_train_batch_size": len(data), **options}
    trainer = make_trainer(path, model, data, exit_start="regression", **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("cache_states", [False, True])
def test_an_exit_is_where_a_logistic_regression_is(cache_states, tmp_path):
    data, model = Rows(rows=200), make(exit_pooling="mean", placement="none", train_head=False)
    seen = []
    for m in (1, 2):
        exit_ = model.base_model.block_at(m).own_exit("default", m)
        exit_.linear.register_forward_pre_hook(lambda _, args, m=m: seen.append((m, args[0])))
    model.eval()(**data.batch)
    inputs = dict(seen)
    seen.clear()
    x = torch.from_numpy(StandardScaler().fit_transform(inputs[1].numpy())).float()
    data.labels = (x @ torch.randn(x.shape[1], 3, generator=torch.Generator().manual_seed(0))).argmax(dim=1)
    started(tmp_path, model, data, cache_states=cache_states)
    found = exits_of(model.eval(), data.batch)
    for j, m in enumerate((1, 2)):
        x = StandardScaler().fit_transform(inputs[m].numpy())
        best = max(
            LogisticRegression(C=c, max_iter=200).fit(x, data.labels).score(x, data.labels)
            for c in (1e-3, 1e-2, 0.1, 1.0)
        )
        score = float((found[:, j].argmax(dim=-1) == data.labels).float().mean())
        assert score >= best - 0.1 and score > 0.4


@pytest.mark.parametrize(("kind", "labels"), PROBLEMS)
def test_every_problem_type_starts_better_than_at_random(kind, labels, tmp_path):
    data, random, model = Rows(kind, labels, rows=60), make(kind, labels), make(kind, labels)
    started(tmp_path, model, data)
    losses = [float(m.eval()(**data.batch, labels=data.labels).loss) for m in (random, model)]
    assert losses[1] < losses[0]


def test_exits_that_attend_start_as_they_are_drawn(tmp_path):
    data, model = Rows(rows=40), make(exit_type="residual_mha")
    before = weights(model)
    started(tmp_path, model, data)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items() if ".linear." in name)


@pytest.mark.parametrize("objective", ["alternating", "single_exit", "gradient_equilibrium"])
def test_an_objective_starts_the_exits_that_it_trains(objective, tmp_path):
    data, model = Rows(rows=40), make()
    before = weights(model)
    depth = {"depth": 2} if objective == "single_exit" else {}
    started(tmp_path, model, data, objective=objective, **depth)
    moved = {name.split("badge_exit.default.")[1][0] for name, value in weights(model).items()
             if "badge_exit" in name and not torch.equal(before[name], value)}  # fmt: skip
    assert moved == ({"2"} if depth else {"1", "2"})


def test_without_labels_exits_start_at_full_depths_answers(tmp_path):
    data, model = Rows(rows=120, labeled=False), make(exit_pooling="mean", train_head=False)
    started(tmp_path, model, data, distillation=1.0)
    found = exits_of(model.eval(), data.batch).softmax(dim=-1)
    assert np.corrcoef(found[:, 1].flatten(), found[:, 2].flatten())[0, 1] > 0.5


def test_a_trained_backbone_has_no_start(tmp_path):
    data, model = Rows(rows=20), make(backbone="full")
    before = weights(model)
    started(tmp_path, model, data, learning_rate=0.0)
    name = next(name for name in before if "badge_exit.default.1.linear.weight" in name)
    assert torch.equal(before[name], weights(model)[name])
