"""Policies that trust one exit's own confidence: entropy, largest probability, and PCEE's patience."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig, register_policy
from badge_peft.early_exit.divergences import max_entropy
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.utils.problem import problem_of

LARGEST = 32.0  # of a temperature; its inverse is the smallest
_STEPS = 40


class ConfidencePolicy(ThresholdPolicy):
    """Reads the distribution that an exit predicts, and no other exit."""

    @classmethod
    def suits(cls, problem_type: str) -> bool:
        """Values have no distribution."""
        return problem_of(problem_type).gives_labels

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses regression."""
        super().check(exits, num_labels, problem_type)
        if not self.suits(problem_type):
            raise ValueError(
                f"policy={self.name!r} needs a distribution, and regression has none: use 'patience', 'divergence', "
                "'learned' or 'fixed_depth'."
            )

    def lookback(self) -> int:
        """No exit."""
        return 0


@register_policy
class EntropyPolicy(ConfidencePolicy):
    """Stop where the entropy of p_m, in nats, is below the threshold (BranchyNet, DeeBERT).

    Default: 0.3 ln K. Multi-label: the sum of the labels' entropies, against K ln 2.
    """

    name = "entropy"
    in_default_sweep = True
    counts_labels = False

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: nats."""
        return history.entropy(j)

    def score_nodes(self, at: Any) -> Any:
        """[n]: nats."""
        return at.entropy()

    def in_nats(self, problem_type: str) -> bool:
        return True

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.3 * max_entropy(num_labels, problem_type)


@register_policy
class MaxProbPolicy(ConfidencePolicy):
    """Stop where the largest probability is at least the threshold; each exit may have a temperature by which its
    logits are divided first (Schwartz et al., "The Right Tool for the Job", 2020).

    Multi-label: the least sure label counts. Default: 0.9 for two classes, falling to 0.5 for many:
    0.5 + 0.8 / K.
    """

    name = "max_prob"
    stops_above = True
    in_default_sweep = True
    counts_labels = False

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: probability."""
        if self.config.temperature is None:
            return history.confidence(j)
        scaled = history.logits[j] / np.float32(self.config.temperature[j])
        return ExitHistory.of(scaled[:, None], history.exits[j : j + 1], history.problem_type).confidence(0)

    def score_nodes(self, at: Any) -> Any:
        """[n]: probability."""
        logits = at.logits
        if self.config.temperature is not None:
            logits = at.op("Div", logits, at.floats(self.config.temperature[at.index]))
        return at.confidence(at.log_probs(logits))

    def per_exit_forms(self, history: ExitHistory, labels: Tensor | None) -> list[EarlyExitConfig]:
        """With the temperatures that make the probabilities of each exit right on average."""
        if labels is None or self.config.temperature is not None:
            return []
        return [replace(self.config, temperature=fitted_temperatures(history, labels.numpy()))]

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.9 if problem_of(problem_type).many_labels else 0.5 + 0.8 / max(num_labels, 2)

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses temperatures that are not one per exit, too."""
        super().check(exits, num_labels, problem_type)
        if self.config.temperature is not None and len(self.config.temperature) != len(exits):
            raise ValueError(
                f"temperature has {len(self.config.temperature)} numbers, but there are {len(exits)} exits."
            )


@register_policy
class ConfidentPatiencePolicy(ConfidencePolicy):
    """PCEE: stop when t exits in a row have an entropy below the threshold, a share of ln K.

    The score is the largest of the last t entropies, divided by ln K. Where each exit has its own threshold, each
    of the t is compared with its own. Source: Zhang et al., "PCEE-BERT", 2022.
    Defaults: t = 2, threshold 0.4.
    """

    name = "confident_patience"
    counts_exits = True
    default_patience = 2

    @property
    def decides_alone(self) -> bool:
        """A run of exits counts."""
        return False

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
        return self.share(history, worst)

    def should_exit_each(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: t exits in a row are sure enough, each by its own threshold."""
        if j + 1 < self.patience:
            return np.zeros(history.rows, dtype=bool)
        return self._all_below(history, [self.share(history, history.entropy(j - k)) for k in range(self.patience)], j)

    def nodes(self, at: Any) -> Any:
        """The run of exits that are sure enough."""
        share = at.op("Div", at.entropy(), at.floats(at.scale))
        return at.run_of(at.op("Less", share, at.threshold))

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.4

    @staticmethod
    def share(history: ExitHistory, entropy: Array) -> Array:
        """Of the largest entropy."""
        return entropy / np.float32(max_entropy(history.num_labels, history.problem_type))


def fitted_temperatures(history: ExitHistory, labels: Array) -> list[float]:
    """[E]: the temperature of each exit with the least cross-entropy on these rows.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; of exits, Schwartz et al., "The Right
    Tool for the Job", ACL 2020.

    The cross-entropy is convex in the inverse temperature, so bisection of its derivative finds it. It lies in
    [1 / 32, 32], which it reaches where an exit is always right, or knows nothing.

    Args:
        history: All exits seen.
        labels: [n] class numbers, of which any outside of 0..K-1 are left out, or [n, K] targets of 0 and 1.
    """
    low: Array = np.full(len(history.exits), 1 / LARGEST)
    high: Array = np.full(len(history.exits), LARGEST)
    for _ in range(_STEPS):
        middle = np.sqrt(low * high)
        rises = _slope(history, labels, middle) > 0
        low, high = np.where(rises, low, middle), np.where(rises, middle, high)
    return [float(f"{1 / x:.6g}") for x in np.sqrt(low * high)]


def _slope(history: ExitHistory, labels: Array, inverse: Array) -> Array:
    """[E]: the derivative of the cross-entropy's sum by the inverse temperature."""
    logits: Array = history.logits.astype(np.float64)  # [E, n, K]
    scaled: Array = logits * inverse[:, None, None]
    if history.problem.many_labels:
        probabilities, targets = 0.5 * (1 + np.tanh(scaled / 2)), labels.astype(np.float64)
    else:
        known = (labels >= 0) & (labels < history.num_labels)
        logits, scaled = logits[:, known], scaled[:, known]
        weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        probabilities = weights / weights.sum(axis=-1, keepdims=True)
        targets = np.eye(history.num_labels)[labels[known]]
    return ((probabilities - targets) * logits).sum(axis=(1, 2))
