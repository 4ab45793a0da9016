"""The models of `agreement`: the minimum itself, and not where an optimizer happened to stop on this machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.agreement import AgreementPolicy, features, fitted_parameters

from .reference import MULTI, SINGLE


def test_the_fit_is_the_minimum() -> None:
    """Of the logistic loss with half of the squared weights (of standardized features) on top, by Newton steps."""
    history = ExitHistory.of(_logits(), [1, 2, 3], SINGLE)
    found = fitted_parameters(history, None, reference=3)
    last = history.logits[2].argmax(-1)
    for j in range(2):
        x, right = features(history, j).astype(np.float64), history.logits[j].argmax(-1) == last
        mean, scale = x.mean(axis=0), x.std(axis=0)
        scale[scale == 0] = 1.0
        design = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1)
        penalty = np.r_[np.ones(x.shape[1]), 0.0]
        sign = np.where(right, 1.0, -1.0)

        def loss(w: np.ndarray, design=design, penalty=penalty, sign=sign) -> float:
            return float(np.logaddexp(0, -sign * (design @ w)).sum() + 0.5 * penalty @ w**2)

        def slope(w: np.ndarray, design=design, penalty=penalty, right=right) -> np.ndarray:
            return design.T @ (expit(design @ w) - right) + penalty * w

        def curve(w: np.ndarray, design=design, penalty=penalty) -> np.ndarray:
            p = expit(design @ w)
            return (design * (p * (1 - p))[:, None]).T @ design + np.diag(penalty)

        best = minimize(loss, np.zeros(design.shape[1]), jac=slope, hess=curve, method="trust-exact", tol=1e-9).x
        weights = best[:-1] / scale
        np.testing.assert_allclose(found["coefficients"][j], weights, rtol=1e-4, atol=1e-5)
        assert found["intercepts"][j] == pytest.approx(best[-1] - weights @ mean, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, "regression"])
def test_the_rounding_of_logits_does_not_move_the_fit(problem_type: str) -> None:
    """Another machine's logits differ in the seventh digit."""
    logits = _logits()[..., : 1 if problem_type == "regression" else None]
    noise = 1 + 1e-7 * np.random.default_rng(1).standard_normal(logits.shape)
    one, other = (
        fitted_parameters(ExitHistory.of(x.astype(np.float32), [1, 2, 3], problem_type), None, 3)
        for x in (logits, logits * noise)
    )
    for name in ("coefficients", "intercepts"):
        np.testing.assert_allclose(np.hstack(one[name]), np.hstack(other[name]), rtol=1e-4, atol=1e-4)


def test_no_row_goes_beyond_the_reference() -> None:
    history, asked = ExitHistory.of(_logits(), [1, 2, 3], SINGLE), EarlyExitConfig(policy="agreement", max_exit=3)
    fitted = AgreementPolicy.fit(asked, history, None, reference=2)
    assert fitted.max_exit == 3 and AgreementPolicy(fitted).max_exit == 2
    assert AgreementPolicy.fit(replace(asked, max_exit=None), history, None, reference=2).max_exit == 2
    with pytest.raises(ValueError, match="min_exit=3 is deeper than exit 2, beyond which no row goes"):
        AgreementPolicy.fit(replace(asked, min_exit=3), history, None, reference=2)


def _logits() -> np.ndarray:
    """[200, 3, 4]: exits that agree the more, the deeper they are."""
    draw = np.random.default_rng(0)
    truth = 2 * draw.standard_normal((200, 1, 4))
    return (truth + draw.standard_normal((200, 3, 4)) * [[[3.0], [2.0], [0.5]]]).astype(np.float32)
