"""A bound on what a setting loses on new data, by Learn-then-Test with a betting test.

Candidates are found on one half of the data and ordered from slow to fast; on the other half each is tested in turn
("its expected loss exceeds alpha"), and the first that cannot be rejected ends the walk. So the probability that a
setting with a larger loss is returned is at most 1 - confidence, however many are tried.

Sources: Angelopoulos et al., "Learn then Test", 2021; Laufer-Goldshtein et al., "Efficiently Controlling Multiple
Risks with Pareto Testing", 2023. The test is the betting martingale of Waudby-Smith and Ramdas, "Estimating means of
bounded random variables by betting", 2024, which notices that most rows keep their answer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric
from badge_peft.evaluation.tradeoff import pareto, search
from badge_peft.utils.checks import check_number
from badge_peft.utils.problem import problem_of

CERTIFIED_SETTINGS = 20  # fewer than elsewhere, as each has to pass a test
_LARGEST_BET = 0.75  # share of the wealth that one row can lose


def certified(
    exit_logits: ExitLogits, policy: Any, alpha: float | None, confidence: float, metric: Metric, per_exit: bool
) -> tuple[EarlyExitConfig, int]:
    """The fastest setting whose loss against full depth is below `alpha` on new data, with the given confidence; and
    the number of rows that tested it."""
    needed = rows_to_certify(alpha, confidence, metric, exit_logits.kind)
    assert alpha is not None
    units = exit_logits.units
    rows = torch.randperm(len(units), generator=torch.Generator().manual_seed(0)).numpy()
    half = len(rows) // 2
    if len(rows) < needed:
        raise ValueError(
            f"the data is too small: to certify a drop of at most {alpha} with confidence {confidence} takes at least "
            f"{needed} rows even where no answer changes, and there are {len(rows)}. "
            "Give more rows, or allow a larger drop."
        )
    search_half, test_half = (
        exit_logits.select(torch.from_numpy(units.rows_of(part))) for part in (rows[:half], rows[half:])
    )
    assert test_half.labels is not None
    error = problem_of(test_half.kind).error  # [n], 1 where the answer is wrong
    full_depth = error(test_half.logits[:, -1], test_half.labels)
    best = None
    for point in pareto(search(search_half, policy, CERTIFIED_SETTINGS, metric, per_exit)):
        stops = torch.from_numpy(build_policy(point.config).replay_history(test_half.history()))
        losses = (error(test_half.answers(stops), test_half.labels) - full_depth).numpy()
        losses = test_half.units.total(losses) / test_half.units.sizes  # of tokens, the mean over those of a text
        if not is_certified(losses, alpha, confidence):
            break
        best = point.config
    if best is None:
        raise ValueError(
            f"no setting could be certified to lose at most {alpha} with confidence {confidence} on "
            f"{len(rows) - half} test rows: give more rows, or allow more."
        )
    return best, len(test_half.units)


def rows_to_certify(max_score_drop: float | None, confidence: float, metric: Metric, problem_type: str) -> int:
    """How many rows a bound takes, those that find the settings among them, even where no answer changes."""
    if max_score_drop is None or metric != "accuracy" or problem_type != "single_label_classification":
        raise ValueError("confidence needs max_score_drop, metric='accuracy' and one label per row.")
    check_number("confidence", confidence, lambda p: 0 < p < 1, "it is a probability, for example 0.95")
    share = "with confidence it is a share of the rows, below 1 (0.01 is a point of accuracy)"
    check_number("max_score_drop", max_score_drop, lambda drop: drop < 1, share)
    return 2 * rows_needed(max_score_drop, confidence)


def rows_needed(alpha: float, confidence: float) -> int:
    """Rows below which not even a setting that changes no answer can be certified."""
    growth = math.log1p(_LARGEST_BET * alpha / (1 - alpha))
    return math.ceil(math.log(1 / (1 - confidence)) / growth) if growth > 0 else 2**31


def is_certified(losses: np.ndarray, alpha: float, confidence: float) -> bool:
    """Whether losses [n], from -1 (an answer won) to 1 (lost), reject "the mean loss is alpha or more".

    The wealth of a bet that pays where losses are small is a non-negative supermartingale under that hypothesis, so it
    reaches 1 / (1 - confidence) with probability at most 1 - confidence.
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
