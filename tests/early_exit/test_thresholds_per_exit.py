"""A threshold for each exit: every policy against its formula in a plain loop, and equal ones against a single one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits, sweep
from tests.models import make_badge, make_batch

from .reference import MULTI, REGRESSION, SINGLE, distributions, divergences, entropy
from .rules import NO_REGRESSION, ON_LOGITS, fields_of

EXITS, ROWS, K = 6, 80, 4


def logits_of(problem: str, seed: int = 0) -> torch.Tensor:
    """[N, E, K]: exits that agree more and more."""
    rng = np.random.default_rng(seed)
    final = rng.normal(scale=2.0, size=(ROWS, 1, 1 if problem == REGRESSION else K))
    noise = rng.normal(size=(ROWS, EXITS, final.shape[2])) * rng.uniform(0.1, 2.0, size=(ROWS, 1, 1))
    return torch.from_numpy((final + noise * np.linspace(1.0, 0.2, EXITS)[None, :, None]).astype(np.float32))


def stops_at(rule: dict, row: list[list[float]], problem: str, taus: list[float]) -> int:
    """The exit (index) at which a row stops, from the formulas."""
    name, t = rule["policy"], rule.get("patience", 1)
    s = divergences(rule.get("divergence", "ce"), row, problem)
    spread = [sum(map(entropy, distributions(x, problem))) for x in row]
    most = K * math.log(2) if problem == MULTI else math.log(K)
    sure = [min(max(p) for p in distributions(x, problem)) for x in row]
    for m in range(EXITS - 1):
        if name == "divergence" and rule.get("window") != "consecutive":
            stops = sum(s[m][i] < taus[m] for i in range(m)) >= t
        elif name == "divergence":
            stops = m >= t and all(s[j][j - 1] < taus[j] for j in range(m - t + 1, m + 1))
        elif name == "entropy":
            stops = spread[m] < taus[m]
        elif name == "max_prob":
            stops = sure[m] >= taus[m]
        else:
            stops = m + 1 >= t and all(spread[j] / most < taus[j] for j in range(m - t + 1, m + 1))
        if stops:
            return m
    return EXITS - 1


RULES = [
    *({"policy": "divergence", "divergence": d, "window": w} for d in ("ce", "kl") for w in ("all", "consecutive")),
    {"policy": "divergence", "patience": 2},
    {"policy": "divergence", "divergence": "kl", "window": "consecutive", "patience": 3},
    {"policy": "entropy"},
    {"policy": "max_prob"},
    {"policy": "confident_patience", "patience": 1},
    {"policy": "confident_patience", "patience": 2},
]


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_formulas(rule, problem):
    logits = logits_of(problem)
    scale = {"max_prob": 1.0, "confident_patience": 1.0}.get(rule["policy"], 2.0)
    taus = [scale * x for x in (0.31, 0.62, 0.17, 0.44, 0.53, 0.0)]
    if rule["policy"] == "max_prob":
        taus = [0.91, 0.62, 0.97, 0.74, 0.58, 0.0]
    found = build_policy({**rule, "threshold": taus}).replay(logits, problem_type=problem) - 1
    assert found.tolist() == [stops_at(rule, row, problem, taus) for row in logits.tolist()]
    assert len(set(found.tolist())) > 2


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.data())
def test_equal_ones_are_one(data):
    problem = data.draw(st.sampled_from([SINGLE, MULTI, REGRESSION]))
    name = data.draw(st.sampled_from([n for n in ON_LOGITS if problem != REGRESSION or n not in NO_REGRESSION]))
    logits = logits_of(problem, data.draw(st.integers(0, 99)))
    exits = list(range(1, EXITS + 1))
    rule = {
        **fields_of(name, exits, logits.shape[2], problem),
        "patience": data.draw(st.none() | st.integers(1, 4)),
        "window": data.draw(st.sampled_from(["all", "consecutive"])),
        "divergence": data.draw(st.sampled_from(["ce", "js", "label"])),
    }
    tau = data.draw(st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.5]))
    one, many = (build_policy({**rule, "threshold": x}) for x in (tau, [tau] * EXITS))
    assert torch.equal(one.replay(logits, problem_type=problem), many.replay(logits, problem_type=problem))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_one_for_each_exit(count):
    model, rule = make_badge(), {"policy": "entropy", "threshold": [0.5] * count}
    message = rf"threshold has {count} numbers, but there are 3 exits, at blocks \[1, 2, 3\]: give one for each"
    with pytest.raises(ValueError, match=message):
        model.early_exit_forward(**make_batch(), early_exit_config=rule)
    with pytest.raises(ValueError, match=message):
        model.set_early_exit_config(rule)
    with pytest.raises(ValueError, match=message):
        build_policy(rule).replay(torch.zeros(1, 3, 2))


def test_a_sweep_leaves_them_alone():
    logits = ExitLogits(logits_of(SINGLE), torch.zeros(ROWS).long(), list(range(1, EXITS + 1)), SINGLE, EXITS)
    rule = {"policy": "entropy", "threshold": [0.25, 0.5, 1.0, 1.5, 0.1, 0.0]}
    (point,) = sweep(logits, [rule]).curve("entropy")
    assert point.config.threshold == rule["threshold"]


def test_of_a_ranking():
    """There it is a factor on the margins, which are one for each exit already."""
    scores = logits_of(REGRESSION)
    rule = {"policy": "top_k", "top_k": 5, "parameters": {"margins": [2.0, 1.0, 1.0, 0.5, 0.5, None]}}
    factors = [1.0, 0.5, 2.0, 1.0, 0.0, 1.0]
    margins = [m if m is None else m * f for m, f in zip(rule["parameters"]["margins"], factors, strict=True)]
    wanted = build_policy({**rule, "parameters": {"margins": margins}}).replay(scores)
    assert build_policy({**rule, "threshold": factors}).replay(scores).tolist() == wanted.tolist()
    assert len(set(wanted.tolist())) > 2
    with pytest.raises(ValueError, match=r"threshold=\[1.0, -0.5\] is not allowed: with policy='top_k'"):
        build_policy({**rule, "threshold": [1.0, -0.5]})
