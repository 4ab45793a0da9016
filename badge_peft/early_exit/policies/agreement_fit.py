"""Fits the models of the `agreement` policy, with scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.agreement_features import features
from badge_peft.utils.problem import problem_of

Array = np.ndarray
TOLERANCE = 1e-8  # of the gradient: where scikit-learn's 1e-4 stops differs from machine to machine


def fitted_parameters(history: ExitHistory, labels: Tensor | None, reference: int) -> dict[str, Any]:
    """`EarlyExitConfig.parameters` of the policy; see `AgreementPolicy.fit`.

    Args:
        history: Of data that the model was not trained on, all exits seen.
        labels: Of its rows, where there are any.
        reference: Block number of the exit that answers at the latest.
    """
    problem, exits = problem_of(history.problem_type), history.exits
    answers = [problem.predictions(torch.from_numpy(logits)) for logits in history.logits]
    best = answers[exits.index(reference)]
    coefficients, intercepts = [], []
    for j in range(exits.index(reference)):
        x = features(history, j).astype(np.float64)  # in which scikit-learn then fits
        if problem.gives_labels:
            right = answers[j] == (best if labels is None else problem.targets(labels))
            weights, bias = _logistic(x, right if right.ndim == 1 else right.all(axis=1))
        else:
            distance = np.abs(answers[j] - best).reshape(len(best), -1).mean(axis=1)
            weights, bias = _ridge(x, distance)
        coefficients.append([float(f"{w:.7g}") for w in weights])
        intercepts.append(float(f"{bias:.7g}"))
    return {
        "exits": list(exits),
        "reference": reference,
        "target": "agreement" if labels is None else "correct",
        "problem_type": history.problem_type,
        "coefficients": _padded(coefficients, history),
        "intercepts": intercepts + [0.0] * (len(exits) - len(intercepts)),
    }


def _padded(coefficients: list[list[float]], history: ExitHistory) -> list[list[float]]:
    """One list per exit: the reference and deeper exits are never asked, and have zeros."""
    missing = range(len(coefficients), len(history.exits))
    return coefficients + [[0.0] * features(history, j).shape[1] for j in missing]


def _logistic(x: Array, right: Array) -> tuple[Array, float]:
    rate = (right.sum() + 0.5) / (len(right) + 1)
    if right.all() or not right.any():  # nothing to tell apart: the smoothed rate
        return np.zeros(x.shape[1]), float(np.log(rate / (1 - rate)))
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(tol=TOLERANCE, max_iter=10_000).fit(scaler.transform(x), right)
    weights = model.coef_[0] / scaler.scale_
    return weights, float(model.intercept_[0] - weights @ scaler.mean_)


def _ridge(x: Array, distance: Array) -> tuple[Array, float]:
    scaler = StandardScaler().fit(x)
    model = Ridge().fit(scaler.transform(x), distance)
    weights = model.coef_ / scaler.scale_
    return weights, float(model.intercept_ - weights @ scaler.mean_)
