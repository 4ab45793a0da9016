"""Rules that trust one exit's own confidence: entropy, largest probability, a learned doubt, and their patience."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from badge_peft.early_exit import divergences as div
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, max_entropy
from badge_peft.early_exit.policies.threshold import ThresholdPolicy


def _no_regression(name: str, problem_type: str) -> None:
    if problem_type == "regression":
        raise ValueError(
            f"policy={name!r} needs a distribution, and regression has none: use 'patience', 'divergence', 'learned' "
            "or 'fixed_depth'."
        )


class EntropyPolicy(ThresholdPolicy):
    """Stop where the entropy of p_m, in nats, is below the threshold (BranchyNet, DeeBERT).

    With `normalize=True` the threshold is a share of ln K, FastBERT's "speed". Default: 0.3 ln K. Multi-label: the sum
    of the labels' entropies, against K ln 2.
    """

    name = "entropy"

    def lookback(self) -> int:
        """No exit."""
        return 0

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: nats."""
        return history.entropy(j)

    def in_nats(self, problem_type: str) -> bool:
        """Yes."""
        return True

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """See the class."""
        return 0.3 * max_entropy(num_labels, problem_type)

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses regression."""
        super().check(exits, num_labels, problem_type)
        _no_regression(self.name, problem_type)


class ConfidentPatiencePolicy(EntropyPolicy):
    """PCEE: stop when t exits in a row have an entropy below the threshold, a share of ln K.

    The score is the largest of the last t entropies, divided by ln K. Source: Zhang et al., "PCEE-BERT", 2022.
    Defaults: t = 2, threshold 0.4.
    """

    name = "confident_patience"
    default_patience = 2

    @property
    def patience(self) -> int:
        """t."""
        return self.config.patience if self.config.patience is not None else self.default_patience

    def lookback(self) -> int:
        """t - 1."""
        return self.patience - 1

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: share of the largest entropy."""
        t = self.patience
        if j + 1 < t:
            return self.never_exits(history)
        worst = history.entropy(j)
        for k in range(1, t):
            worst = np.maximum(worst, history.entropy(j - k))
        return worst / np.float32(max_entropy(history.num_labels, history.problem_type))

    def in_nats(self, problem_type: str) -> bool:
        """No: the score is a share of ln K already."""
        return False

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """See the class."""
        return 0.4


class MaxProbPolicy(ThresholdPolicy):
    """Stop where the largest probability is at least the threshold; each exit may have a temperature by which its
    logits are divided first (Schwartz et al., "The Right Tool for the Job", 2020).

    Multi-label: the least sure label counts. Default: 0.9 for two classes, falling to 0.5 for many:
    0.5 + 0.8 / K.
    """

    name = "max_prob"
    stops_above = True

    def lookback(self) -> int:
        """No exit."""
        return 0

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: probability."""
        if self.config.temperature is None:
            return history.confidence(j)
        return div.largest_probability(
            history.logits[j] / np.float32(self.config.temperature[j]), history.problem_type
        )

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """See the class."""
        return 0.9 if problem_type == "multi_label_classification" else 0.5 + 0.8 / max(num_labels, 2)

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses regression, and temperatures that are not one per exit."""
        super().check(exits, num_labels, problem_type)
        _no_regression(self.name, problem_type)
        if self.config.temperature is not None and len(self.config.temperature) != len(exits):
            raise ValueError(
                f"temperature has {len(self.config.temperature)} numbers, but there are {len(exits)} exits."
            )


class LearnedPolicy(ThresholdPolicy):
    """LTE, learning to exit: stop where the uncertainty that a small trained layer predicts is below the threshold.

    The layer is a linear map with a sigmoid, shared by all exits. `BadgeConfig(learn_to_exit=True)` adds it, and it is
    trained to predict whether the exit is wrong (regression: how far off it is). Source: Xin et al., "BERxiT", 2021.
    Default threshold: 0.1.
    """

    name = "learned"
    reads_uncertainty = True

    def lookback(self) -> int:
        """No exit."""
        return 0

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: predicted uncertainty in [0, 1]."""
        score = history.uncertainty[j]
        if np.isnan(score).any():
            raise ValueError(
                "policy='learned' needs an adapter with an LTE layer: train with BadgeConfig(learn_to_exit=True)."
            )
        return score

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """See the class."""
        return 0.1
