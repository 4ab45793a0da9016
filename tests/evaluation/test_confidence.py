"""`calibrate(confidence=...)`: the test behind the bound is a plain martingale, is wrong as rarely as it says, and
takes as few rows as it says."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from badge_peft.evaluation import ExitLogits, calibrate, evaluate_policy, exit_scores
from badge_peft.evaluation.confidence import is_certified, rows_needed, rows_to_certify

from .logits import MULTI, REGRESSION, SINGLE, plausible


def certified(losses: list[float], alpha: float, confidence: float) -> bool:
    """The bet of Waudby-Smith and Ramdas, 2024, row by row: what is staked on a row depends on those before it."""
    fair, needed, wealth = (1 - alpha) / 2, 1 / (1 - confidence), 1.0
    gains: list[float] = []
    for loss in losses:
        mean = (0.5 + sum(gains)) / (len(gains) + 1)
        variance = max((0.25 + sum(x * x for x in gains)) / (len(gains) + 1) - mean**2, 1e-12)
        stake = min(math.sqrt(2 * math.log(needed) / (len(losses) * variance)), 0.75 / fair)
        gains.append((1 - loss) / 2)
        wealth *= 1 + stake * (gains[-1] - fair)
        if wealth >= needed:
            return True
    return False


def draw(rng: random.Random, rows: int, lost: float, won: float) -> list[float]:
    """Losses of rows: 1 where a right answer is lost, -1 where one is won."""
    return rng.choices([1.0, -1.0, 0.0], [lost, won, 1 - lost - won], k=rows)


def test_it_is_the_plain_martingale() -> None:
    rng, found = random.Random(0), []
    for _ in range(150):
        alpha, confidence = rng.choice([0.01, 0.05, 0.2]), rng.choice([0.8, 0.9, 0.99])
        won = rng.choice([0.0, 0.02, 0.1])
        losses = draw(rng, rng.choice([1, 60, 250]), won + alpha * rng.uniform(0, 1.2), won)
        found.append(is_certified(np.array(losses), alpha, confidence))
        assert found[-1] == certified(losses, alpha, confidence)
    assert 20 < sum(found) < 130
    assert not is_certified(np.array([]), 0.1, 0.9)


@pytest.mark.parametrize(("alpha", "won"), [(0.02, 0.0), (0.05, 0.05), (0.2, 0.1)])
def test_a_loss_as_large_as_alpha_is_hardly_ever_certified(alpha: float, won: float) -> None:
    rng, tries, confidence = np.random.default_rng(0), 1000, 0.9
    wrong = sum(
        is_certified(rng.choice([1.0, -1.0, 0.0], 300, p=[alpha + won, won, 1 - alpha - 2 * won]), alpha, confidence)
        for _ in range(tries)
    )
    assert wrong <= tries * (1 - confidence) + 3 * math.sqrt(tries * confidence * (1 - confidence))


@pytest.mark.parametrize(("alpha", "confidence"), [(0.01, 0.95), (0.05, 0.9), (0.3, 0.5)])
def test_the_rows_that_a_bound_takes(alpha: float, confidence: float) -> None:
    needed = rows_needed(alpha, confidence)
    assert is_certified(np.zeros(needed), alpha, confidence)
    assert not is_certified(np.zeros(needed - 1), alpha, confidence)
    assert rows_to_certify(alpha, confidence, "accuracy", SINGLE) == 2 * needed
    assert rows_needed(0.0, 0.9) > 10**9


def test_it_holds_on_new_rows() -> None:
    stored, new = plausible(rows=1200), plausible(rows=6000, seed=5)
    config = calibrate(stored, "divergence", max_score_drop=0.02, confidence=0.9)
    record = config.calibration
    assert record is not None and (record["confidence"], record["test_rows"]) == (0.9, 600)
    assert record["blocks_saved"] > 0.2
    assert exit_scores(new).per_exit[-1] - evaluate_policy(new, config).score < 0.02
    easier = calibrate(stored, "divergence", max_score_drop=0.1, confidence=0.9)
    assert easier.calibration is not None and easier.calibration["blocks_saved"] > record["blocks_saved"]


def test_the_rows_that_certified_nothing_are_those_of_the_test() -> None:
    """Exit 1 is right on all rows that choose, and wrong on all that test it, one more of an odd number."""
    rows = 2 * rows_needed(0.05, 0.95) + 1
    order, labels = torch.randperm(rows, generator=torch.Generator().manual_seed(0)), torch.arange(rows) % 2
    answers = torch.stack([labels, labels], dim=1)
    answers[order[rows // 2 :], 0] += 1
    logits = 5.0 * torch.nn.functional.one_hot(answers % 2)
    with pytest.raises(ValueError, match=f"on {rows // 2 + 1} test rows: give more rows"):
        calibrate(ExitLogits(logits, labels=labels), "patience", max_score_drop=0.05, confidence=0.95)


def test_what_cannot_be_certified() -> None:
    needed = 2 * rows_needed(0.05, 0.95)
    with pytest.raises(ValueError, match=f"takes at least {needed} rows .* and there are {needed - 1}"):
        calibrate(plausible(rows=needed - 1), max_score_drop=0.05, confidence=0.95)
    for metric, kind in (("macro_f1", SINGLE), ("accuracy", MULTI), ("pearson", REGRESSION)):
        with pytest.raises(ValueError, match="confidence needs max_score_drop, metric='accuracy' and one label"):
            rows_to_certify(0.05, 0.9, metric, kind)
    with pytest.raises(ValueError, match="confidence needs max_score_drop"):
        rows_to_certify(None, 0.9, "accuracy", SINGLE)
    for confidence in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"confidence={confidence} is not allowed"):
            rows_to_certify(0.05, confidence, "accuracy", SINGLE)
