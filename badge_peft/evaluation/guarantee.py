"""A bound that holds on new data: Learn-then-Test with a betting test.

Candidates are found on one half of the data and ordered from slow to fast; on the other half each is tested in turn
("its expected loss exceeds alpha"), and the first that cannot be rejected ends the walk. The walk keeps the
probability of returning a setting with a larger loss at 1 - confidence, however many are tried.

Sources: Angelopoulos et al., "Learn then Test", 2021; Laufer-Goldshtein et al., "Efficiently Controlling Multiple
Risks with Pareto Testing", 2023. The test is the betting martingale of Waudby-Smith and Ramdas, "Estimating means of
bounded random variables by betting", 2024, which notices that most rows keep their answer.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray
_LARGEST_BET = 0.75  # share of the wealth that one row can lose


def rows_needed(alpha: float, confidence: float) -> int:
    """Rows below which not even a setting that changes no answer can be certified."""
    growth = math.log1p(_LARGEST_BET * alpha / (1 - alpha))
    return math.ceil(math.log(1 / (1 - confidence)) / growth) if growth > 0 else 2**31


def is_certified(losses: Array, alpha: float, confidence: float) -> bool:
    """Whether data rejects "the mean loss is alpha or more".

    The wealth of a bet that pays where losses are small is a non-negative supermartingale under that hypothesis, so it
    reaches 1 / (1 - confidence) with probability at most 1 - confidence.

    Args:
        losses: [n], in [-1, 1]: 1 where a right answer was lost, -1 where one was won.
        alpha: In [0, 1).
        confidence: In (0, 1).
    """
    gains = (1 - losses.astype(np.float64)) / 2  # in [0, 1]; its mean is at most `fair` under the hypothesis
    fair = (1 - alpha) / 2
    n = len(gains)
    before = np.concatenate([[0.0], np.cumsum(gains)[:-1]])
    squares = np.concatenate([[0.0], np.cumsum(gains**2)[:-1]])
    seen = np.arange(n)
    mean = (before + 0.5) / (seen + 1)
    variance = np.maximum((squares + 0.25) / (seen + 1) - mean**2, 1e-12)  # of the rows before, so the bet is fair
    bets = np.minimum(np.sqrt(2 * math.log(1 / (1 - confidence)) / (n * variance)), _LARGEST_BET / fair)
    wealth = np.cumsum(np.log1p(bets * (gains - fair)))
    return bool(n and wealth.max() >= math.log(1 / (1 - confidence)))
