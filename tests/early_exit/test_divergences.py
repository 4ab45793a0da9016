"""S(p_m, p_i) against scipy in float64, its laws, and its extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import special
from scipy.spatial.distance import jensenshannon

from badge_peft.early_exit import divergences as div
from badge_peft.early_exit.history import ExitHistory

from .reference import MULTI, REGRESSION, SINGLE, divergence

KINDS = ("ce", "kl", "js")
EXTREMES = np.array([-np.inf, -3e38, -1e4, -65504.0, -90.0, 0.0, 1e-30, 12.0, 1e4, 65504.0, 3e38, np.inf], np.float32)

laws = settings(deadline=None, derandomize=True, max_examples=60)


def log_softmax(x):
    out = np.empty_like(x)
    div.log_softmax(x, out=out)
    return out


def pair_logits(low: float = -30.0, high: float = 30.0):
    """[2, n, K] logits of two exits."""
    shape = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6).map(lambda s: (2, s[0], s[1] + 1))
    return arrays(np.float32, shape, elements=st.floats(low, high, width=32))


def scipy_divergence(kind, a, b):
    p, q = special.softmax(a.astype(np.float64), axis=-1), special.softmax(b.astype(np.float64), axis=-1)
    if kind == "kl":
        return special.rel_entr(p, q).sum(axis=-1)
    if kind == "js":
        return jensenshannon(p, q, axis=-1) ** 2
    return special.entr(p).sum(axis=-1) + special.rel_entr(p, q).sum(axis=-1)


@pytest.mark.parametrize("num_labels", [2, 3, 10, 77, 150])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_categorical_agrees_with_scipy(kind, scale, num_labels):
    rng = np.random.default_rng(num_labels)
    p = rng.normal(scale=scale, size=(40, num_labels)).astype(np.float32)
    others = rng.normal(scale=scale, size=(3, 40, num_labels)).astype(np.float32)
    got = div.categorical(kind, log_softmax(p), log_softmax(others))
    assert got.dtype == np.float32
    want = np.stack([scipy_divergence(kind, p, q) for q in others])
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_multi_label_sums_over_bernoulli_distributions(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(scale=2, size=(2, 30, 10)).astype(np.float32)
    got = ExitHistory.of(x.transpose(1, 0, 2), [1, 2], MULTI).to(kind, 1, 0)
    want = [divergence(kind, m, i, MULTI) for m, i in zip(x[1].tolist(), x[0].tolist(), strict=True)]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    two = np.stack([x, np.zeros_like(x)], axis=-1)  # sigmoid(v) is the softmax of (v, 0)
    by_scipy = scipy_divergence(kind, two[1], two[0]).sum(axis=-1)
    np.testing.assert_allclose(got, by_scipy, rtol=2e-5, atol=2e-6)


def test_log_softmax_and_log_sigmoid_agree_with_scipy():
    x = np.linspace(-95, 95, 120, dtype=np.float32).reshape(40, 3)
    np.testing.assert_allclose(
        log_softmax(x), special.log_softmax(x.astype(np.float64), axis=-1), rtol=1e-6, atol=1e-7
    )
    yes, no = np.empty_like(x), np.empty_like(x)
    div.log_sigmoid(x, out=yes, out_other=no)
    np.testing.assert_allclose(yes, special.log_expit(x.astype(np.float64)), rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(no, special.log_expit(-x.astype(np.float64)), rtol=1e-6, atol=1e-37)


@laws
@given(pair_logits())
def test_an_exit_diverges_from_itself_by_its_entropy_or_not_at_all(x):
    log_p = log_softmax(x[0])
    entropy = special.entr(special.softmax(x[0].astype(np.float64), axis=-1)).sum(axis=-1)
    assert (div.categorical("kl", log_p, log_p[None]) == 0).all()
    np.testing.assert_allclose(div.categorical("js", log_p, log_p[None])[0], 0, atol=1e-6)
    np.testing.assert_allclose(div.categorical("ce", log_p, log_p[None])[0], entropy, rtol=1e-4, atol=1e-6)


@laws
@given(pair_logits())
def test_cross_entropy_is_entropy_plus_kl(x):
    log_p, log_q = log_softmax(x[0]), log_softmax(x[1])[None]
    parts = div.categorical("ce", log_p, log_p[None]) + div.categorical("kl", log_p, log_q)
    np.testing.assert_allclose(div.categorical("ce", log_p, log_q), parts, rtol=1e-4, atol=1e-5)


@laws
@given(pair_logits())
def test_signs_bounds_and_symmetry(x):
    log_p, log_q = log_softmax(x[0]), log_softmax(x[1])
    js = div.categorical("js", log_p, log_q[None])
    assert (js == div.categorical("js", log_q, log_p[None])).all()
    assert js.min() > -1e-6 and js.max() < math.log(2) + 1e-6
    assert div.categorical("kl", log_p, log_q[None]).min() > -1e-5
    assert div.categorical("ce", log_p, log_q[None]).min() >= 0


def test_js_reaches_its_bound():
    far = log_softmax(np.array([[60.0, 0.0], [0.0, 60.0]], np.float32))
    np.testing.assert_allclose(div.categorical("js", far[0], far[1][None]), math.log(2), rtol=1e-6)


@laws
@given(pair_logits())
def test_label_is_0_or_1_and_symmetric(x):
    got = div.label(x[0], x[1][None], SINGLE)
    assert set(np.unique(got)) <= {0.0, 1.0}
    assert (got == div.label(x[1], x[0][None], SINGLE)).all()
    assert (div.label(x[0], x[0][None], SINGLE) == 0).all()
    assert got[0].tolist() == [divergence("label", m, i, SINGLE) for m, i in zip(*x.tolist(), strict=True)]


@laws
@given(pair_logits())
def test_multi_label_counts_the_labels_that_differ(x):
    want = [divergence("label", m, i, MULTI) for m, i in zip(*x.tolist(), strict=True)]
    assert div.label(x[0], x[1][None], MULTI)[0].tolist() == want


def test_regression_is_the_distance():
    history = ExitHistory.of(np.array([[[1.0], [-0.5]], [[2.0], [2.25]]], np.float32), [1, 2], REGRESSION)
    for kind in (*KINDS, "label"):
        assert history.to(kind, 1, 0).tolist() == [1.5, 0.25]


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("kind", [*KINDS, "label"])
def test_no_logit_however_large_gives_a_nan_or_an_infinity(kind, problem_type):
    size = len(EXTREMES)
    pairs = np.stack(np.meshgrid(EXTREMES, EXTREMES), axis=-1).reshape(-1, 2)  # all pairs of extreme logits
    first, second = np.repeat(pairs, len(pairs), axis=0), np.tile(pairs, (len(pairs), 1))
    x = np.stack([first, second], axis=1)[:, :, : 1 if problem_type == REGRESSION else 2]
    assert len(x) == size**4
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        history = ExitHistory.of(x, [1, 2], problem_type)
        got = history.to(kind, 1, 0)
        assert np.isfinite(got).all()
        assert got.min() >= -1e-6
        if problem_type != REGRESSION:
            assert np.isfinite(history.entropy(1)).all()


@pytest.mark.parametrize("confident", [(95.0, -5.0), (60.0, -60.0), (12.0, -3.0), (1e4, -1e4), (1e38, -1e38)])
@pytest.mark.parametrize("kind", [*KINDS, "label"])
def test_two_confident_exits_that_agree_are_close(kind, confident):
    """Entropies of exp(x) overflow here in some implementations, and the most confident rows then never stop."""
    x = np.array([[confident, confident]], np.float32)
    np.testing.assert_allclose(ExitHistory.of(x, [1, 2], SINGLE).to(kind, 1, 0), 0, atol=5e-6)
