"""S(p_m, p_i) of Eq. 4 and its relatives, between one exit and several others, in float32 log-space."""

from __future__ import annotations

import math

import numpy as np

from badge_peft.utils.problem import problem_of

Array = np.ndarray
_LN2 = np.float32(np.log(2.0))
#: Beyond it differences of logits would overflow; an infinite logit becomes this.
LARGEST_LOGIT = np.array(1e30, np.float32)
_SMALLEST = -LARGEST_LOGIT


def log_softmax(logits: Array, out: Array) -> None:
    """[n, K] -> log-probabilities, into `out`."""
    # reductions by their ufuncs and clipping by two of them: on a row or two, the Python around numpy's methods is
    # what they cost
    np.maximum(logits, _SMALLEST, out=out)
    np.minimum(out, LARGEST_LOGIT, out=out)
    np.subtract(out, np.maximum.reduce(out, axis=-1, keepdims=True), out=out)
    np.subtract(out, np.log(np.add.reduce(np.exp(out), axis=-1, keepdims=True)), out=out)


def log_sigmoid(logits: Array, out: Array, out_other: Array) -> None:
    """[n, K] -> log of the label's probability into `out`, of its complement into `out_other`."""
    clipped = np.clip(logits, _SMALLEST, LARGEST_LOGIT)
    zero = np.float32(0)
    np.negative(np.logaddexp(zero, -clipped), out=out)
    np.negative(np.logaddexp(zero, clipped), out=out_other)


def categorical(kind: str, log_p: Array, log_q: Array) -> Array:
    """Divergence between p [n, K] and each q [i, n, K], summed over K: [i, n].

    * `ce`: -sum p log q (Eq. 4) = H(p) + KL(p || q), so it is H(p), not 0, where p = q;
    * `kl`: KL(p || q);
    * `js`: the Jensen-Shannon divergence, at most ln 2.
    """
    p = np.exp(log_p)
    if kind == "ce":
        return -np.add.reduce(p * log_q, axis=-1)
    if kind == "kl":
        return np.add.reduce(p * (log_p - log_q), axis=-1)
    middle = np.logaddexp(log_p, log_q) - _LN2
    q = np.exp(log_q)
    return np.float32(0.5) * ((p * (log_p - middle)).sum(axis=-1) + (q * (log_q - middle)).sum(axis=-1))


def label(logits: Array, others: Array, problem_type: str) -> Array:
    """0 where the predicted label is the same, else 1 (multi-label: the number of labels that differ): [i, n]."""
    if problem_of(problem_type).many_labels:
        return ((logits > 0) != (others > 0)).sum(axis=-1).astype(np.float32)
    return (logits.argmax(axis=-1) != others.argmax(axis=-1)).astype(np.float32)


def distance(values: Array, others: Array) -> Array:
    """|y_m - y_i| of regression, summed over outputs: [i, n]."""
    clipped = np.clip(others, _SMALLEST, LARGEST_LOGIT)
    return np.abs(np.clip(values, _SMALLEST, LARGEST_LOGIT) - clipped).sum(axis=-1)


def max_entropy(num_labels: int, problem_type: str) -> float:
    """The largest entropy: ln K, or K ln 2 for K independent labels."""
    return num_labels * math.log(2) if problem_of(problem_type).many_labels else math.log(max(num_labels, 2))
