"""The exit policies written again from their formulas: plain Python loops in float64, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
REGRESSION = "regression"


def softmax(x: Sequence[float]) -> list[float]:
    largest = max(x)
    e = [math.exp(v - largest) for v in x]
    return [v / sum(e) for v in e]


def distributions(x: Sequence[float], problem_type: str) -> list[list[float]]:
    """The distributions that one exit's logits stand for: one over K labels, or K over yes and no."""
    if problem_type == MULTI:
        return [[1 / (1 + math.exp(-v)), 1 / (1 + math.exp(v))] for v in x]
    return [softmax(x)]


def cross_entropy(p: list[float], q: list[float]) -> float:
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def entropy(p: list[float]) -> float:
    return cross_entropy(p, p)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def js(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def divergence(kind: str, m: Sequence[float], i: Sequence[float], problem_type: str) -> float:
    """S(p_m, p_i) of Eq. 4 and its relatives, from two exits' logits."""
    if problem_type == REGRESSION:
        return abs(m[0] - i[0])
    if kind == "label":
        if problem_type == MULTI:
            return sum((a > 0) != (b > 0) for a, b in zip(m, i, strict=True))
        return float(m.index(max(m)) != i.index(max(i)))
    measure = {"ce": cross_entropy, "kl": kl, "js": js}[kind]
    pairs = zip(distributions(m, problem_type), distributions(i, problem_type), strict=True)
    return sum(measure(p, q) for p, q in pairs)


def divergences(kind: str, row: list[list[float]], problem_type: str) -> list[list[float]]:
    """S[m][i] for every i < m, from one row's logits [E][K]."""
    return [[divergence(kind, row[m], row[i], problem_type) for i in range(m)] for m in range(len(row))]


def dge(s: list[list[float]], window: str, tau: float, t: int) -> int:
    """Number (from 1) of the exit that answers, from S[m][i] of one row; the last exit always answers."""
    for m in range(len(s)):
        if window == "all":  # cnt_m = #{ i < m : S(p_m, p_i) < tau } (Eq. 3)
            count = sum(s[m][i] < tau for i in range(m))
        else:
            count = 0
            while m - count > 0 and s[m - count][m - count - 1] < tau:
                count += 1
        if count >= t:
            return m + 1
    return len(s)


def pabee(row: list[list[float]], problem_type: str, patience: int, threshold: float) -> int:
    """Number (from 1) of the exit that answers: PABEE's counter, as its authors' code keeps it."""
    counter, before = 0, None
    for number, logits in enumerate(row, start=1):
        if before is not None:
            if problem_type == REGRESSION:
                same = abs(logits[0] - before[0]) < threshold
            elif problem_type == MULTI:
                same = [v > 0 for v in logits] == [v > 0 for v in before]
            else:
                same = logits.index(max(logits)) == before.index(max(before))
            counter = counter + 1 if same else 0
        before = logits
        if counter == patience:
            return number
    return len(row)
