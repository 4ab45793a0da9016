"""Fits the `agreement` policy on stored exit logits, with scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.agreement import features
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import exit_scores, predictions

Array = np.ndarray


def best_exit(exit_logits: ExitLogits) -> int:
    """Block number of the exit that is best on this data: the most often right (regression: the closest); without
    labels, the last."""
    if exit_logits.labels is None:
        return exit_logits.exits[-1]
    regression = exit_logits.problem_type == "regression"
    return exit_scores(exit_logits, "neg_mse" if regression else "accuracy").best_exit


def fit_agreement(exit_logits: ExitLogits) -> EarlyExitConfig:
    """The `agreement` policy for these exits, its threshold left open.

    With labels the target is "this exit is right", and the reference is the best exit; without, it is "this exit says
    what the last one says". For regression it is the distance from the reference's value.

    Args:
        exit_logits: Of data that the model was not trained on. Labels are not needed.
    """
    history = exit_logits.history()
    exits = exit_logits.exits
    labelled = exit_logits.labels is not None
    reference = best_exit(exit_logits)
    answers = [predictions(exit_logits.logits[:, j], exit_logits.problem_type) for j in range(len(exits))]
    coefficients, intercepts = [], []
    for j in range(exits.index(reference)):
        if exit_logits.problem_type == "regression":
            weights, bias = _ridge(features(history, j), np.abs(answers[j] - answers[exits.index(reference)]))
        else:
            truth = _labels(exit_logits) if labelled else answers[exits.index(reference)]
            right = answers[j] == truth
            weights, bias = _logistic(features(history, j), right if right.ndim == 1 else right.all(axis=1))
        coefficients.append([float(f"{w:.7g}") for w in weights])
        intercepts.append(float(f"{bias:.7g}"))
    return EarlyExitConfig(
        policy="agreement",
        max_exit=reference,
        parameters={
            "exits": list(exits),
            "reference": reference,
            "target": "correct" if labelled else "agreement",
            "problem_type": exit_logits.problem_type,
            "coefficients": _padded(coefficients, history),
            "intercepts": intercepts + [0.0] * (len(exits) - len(intercepts)),
        },
    )


def _labels(exit_logits: ExitLogits) -> Array:
    assert exit_logits.labels is not None
    labels = exit_logits.labels.numpy()
    return labels > 0.5 if exit_logits.problem_type == "multi_label_classification" else labels


def _padded(coefficients: list[list[float]], history: ExitHistory) -> list[list[float]]:
    """One list per exit: those at the reference and behind it are never asked, and have zeros."""
    missing = range(len(coefficients), len(history.exits))
    return coefficients + [[0.0] * features(history, j).shape[1] for j in missing]


def _logistic(x: Array, right: Array) -> tuple[Array, float]:
    rate = (right.sum() + 0.5) / (len(right) + 1)
    if right.all() or not right.any():  # nothing to tell apart: the smoothed rate
        return np.zeros(x.shape[1]), float(np.log(rate / (1 - rate)))
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(x), right)
    weights = model.coef_[0] / scaler.scale_
    return weights, float(model.intercept_[0] - weights @ scaler.mean_)


def _ridge(x: Array, distance: Array) -> tuple[Array, float]:
    scaler = StandardScaler().fit(x)
    model = Ridge().fit(scaler.transform(x), distance)
    weights = model.coef_ / scaler.scale_
    return weights, float(model.intercept_ - weights @ scaler.mean_)
