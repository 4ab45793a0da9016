"""Policies that trust one exit's own confidence: entropy, largest probability, and PCEE's patience."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.divergences import max_entropy
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array
from badge_peft.early_exit.policies.evidence import Evidence, Measured, Quantity, exits_in_words
from badge_peft.early_exit.policies.nodes import ExitNodes, Value
from badge_peft.early_exit.policies.temperature import fitted_temperatures
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.early_exit.registry import register_policy
from badge_peft.utils.problem import problem_of


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

    def score_nodes(self, at: ExitNodes) -> Value:
        """[n]: nats."""
        return at.entropy()

    def in_nats(self, problem_type: str) -> bool:
        return True

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.3 * max_entropy(num_labels, problem_type)

    def quantity(self, problem_type: str) -> Quantity:
        return Quantity("entropy", "H")


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

    def score_nodes(self, at: ExitNodes) -> Value:
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

    def quantity(self, problem_type: str) -> Quantity:
        several = problem_of(problem_type).many_labels
        return Quantity("probability of the least sure label" if several else "largest probability", "p")


@register_policy
class ConfidentPatiencePolicy(ConfidencePolicy):
    """PCEE: stop when t exits in a row have an entropy below the threshold, a share of ln K.

    The score is the largest of the last t entropies, divided by ln K. Where each exit has a threshold of its own, each
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
        return self._share(history, worst)

    def should_exit_each(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: t exits in a row are sure enough, each by its own threshold."""
        if j + 1 < self.patience:
            return np.zeros(history.rows, dtype=bool)
        return self._all_below(
            history, [self._share(history, history.entropy(j - k)) for k in range(self.patience)], j
        )

    def nodes(self, at: ExitNodes) -> Value | None:
        """The run of exits that are sure enough."""
        share = at.op("Div", at.entropy(), at.floats(at.scale))
        return at.run_of(at.op("Less", share, at.threshold))

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.4

    def quantity(self, problem_type: str) -> Quantity:
        return Quantity("entropy as a share of the largest", "H")

    def evidence(self, history: ExitHistory, j: int) -> Evidence | None:
        """The exit's own entropy, and how many exits in a row, up to this one, were sure enough."""
        shares = [float(self._share(history, history.entropy(i))[0]) for i in range(j + 1)]
        count = 0
        while count <= j and self._passes(history, shares[j - count], j - count):
            count += 1
        return self._evidence(history, j, (Measured(history.exits[j], shares[j], count > 0),), count, in_a_row=True)

    def sentence(self, exits: Sequence[int], j: int, evidence: Evidence | None, problem_type: str) -> str:
        """The exits that were sure."""
        if self.is_final(exits, j) or evidence is None or evidence.count is None:
            return super().sentence(exits, j, evidence, problem_type)
        return (
            f"{exits_in_words(evidence.count)} in a row, this one the last, had an entropy below tau = "
            f"{evidence.limit} of the largest there can be: {evidence.comparison}."
        )

    @staticmethod
    def _share(history: ExitHistory, entropy: Array) -> Array:
        return entropy / np.float32(max_entropy(history.num_labels, history.problem_type))
