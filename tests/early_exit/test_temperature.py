"""Temperatures for each exit against torch's own optimizer, and what they are for: probabilities that are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.confidence import LARGEST, fitted_temperatures
from badge_peft.utils.problem import UNKNOWN_LABEL

from .reference import MULTI, REGRESSION, SINGLE


def data(problem, rows=300, exits=3, labels=4, seed=0):
    """Logits [N, E, K] that are too large at one exit and too small at another, and labels."""
    rng = np.random.default_rng(seed)
    true = rng.normal(scale=1.5, size=(rows, 1, labels))
    logits = true * np.array([0.3, 1.0, 5.0])[None, :exits, None]
    if problem == MULTI:
        targets = (rng.random((rows, labels)) < 1 / (1 + np.exp(-true[:, 0]))).astype(np.float32)
    else:
        weights = np.exp(true[:, 0])
        chance = weights / weights.sum(-1, keepdims=True)
        targets = np.array([rng.choice(labels, p=p) for p in chance])
    return logits.astype(np.float32), targets


def loss(logits, targets, problem):
    if problem == MULTI:
        return F.binary_cross_entropy_with_logits(logits, torch.from_numpy(targets).double())
    return F.cross_entropy(logits, torch.from_numpy(targets))


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_least_cross_entropy(problem):
    logits, targets = data(problem)
    found = fitted_temperatures(ExitHistory.of(logits, [1, 2, 3], problem), targets)
    for j, temperature in enumerate(found):
        z = torch.from_numpy(logits[:, j]).double()
        log_t = torch.zeros((), dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn="strong_wolfe")

        def closure(z=z, log_t=log_t, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(z / log_t.exp(), targets, problem)
            value.backward()
            return value

        optimizer.step(closure)
        assert temperature == pytest.approx(float(log_t.exp()), rel=1e-3)
    assert found[0] < 0.6 < 0.8 < found[1] < 1.25 < 3 < found[2]


def test_rows_of_unknown_classes_are_left_out():
    logits, targets = data(SINGLE)
    history = ExitHistory.of(logits, [1, 2, 3], SINGLE)
    rows = np.arange(len(targets)) % 3 > 0
    unknown = np.where(rows, targets, UNKNOWN_LABEL)
    alone = fitted_temperatures(ExitHistory.of(logits[rows], [1, 2, 3], SINGLE), targets[rows])
    assert fitted_temperatures(history, unknown) == alone


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_an_exit_that_is_always_right_or_knows_nothing(scale):
    targets = np.arange(30) % 3
    right = scale * np.eye(3, dtype=np.float32)[targets]
    logits = np.stack([right, -right, np.zeros_like(right)], axis=1)
    found = fitted_temperatures(ExitHistory.of(logits, [1, 2, 3], SINGLE), targets)
    assert found[0] == pytest.approx(1 / LARGEST, rel=1e-4) and found[1] == pytest.approx(LARGEST, rel=1e-4)
    assert np.isfinite(found).all()


def test_it_is_a_form_of_max_prob():
    logits, targets = data(SINGLE)
    history, labels = ExitHistory.of(logits, [1, 2, 3], SINGLE), torch.from_numpy(targets)
    (form,) = build_policy(policy="max_prob", min_exit=1).per_exit_forms(history, labels)
    assert form.temperature == fitted_temperatures(history, targets) and form.min_exit == 1
    assert build_policy(form).per_exit_forms(history, labels) == []  # they are given
    assert build_policy(policy="max_prob").per_exit_forms(history, None) == []
    assert build_policy(policy="entropy").per_exit_forms(history, labels) == []
    values = ExitHistory.of(logits[:, :, :1], [1, 2, 3], REGRESSION)
    assert build_policy(policy="divergence").per_exit_forms(values, labels) == []
    # probabilities are right on average, which they were not
    j, policy = 2, build_policy(form)
    said, correct = policy.score(history, j), logits[:, j].argmax(-1) == targets
    plain = build_policy(policy="max_prob").score(history, j)
    assert abs(said.mean() - correct.mean()) < 0.05 < abs(plain.mean() - correct.mean())
