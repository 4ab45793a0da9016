"""DGE (Eq. 3-4), and PABEE's patience as its special case."""

from __future__ import annotations

from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, ExitPolicy, log_labels


class DivergencePolicy(ExitPolicy):
    """Divergence-based early exiting: stop at block m when at least t earlier exits predicted a distribution whose
    divergence from p_m is below tau.

        cnt_m = #{ i < m : S(p_m, p_i) < tau };  stop at the first m with cnt_m >= t        (Eq. 3)

    `window="all"` is Eq. 3. `window="consecutive"` counts the unbroken run of adjacent agreements
    S(p_j, p_{j-1}) < tau that ends at m. Source: BADGE, section 3.2.

    Defaults: t = 1; tau = 0.3 ln K for `ce` (which has to exceed the entropy of the prediction itself), 0.05 ln K for
    `kl`, 0.02 ln K for `js`, 0.5 for `label`; K independent labels count K ln 2 in place of ln K; 0.1 for regression,
    where S = |y_m - y_i|. With `normalize=True` tau is a share of ln K.
    """

    name = "divergence"
    default_patience = 1

    def agrees(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: cnt_j >= t."""
        t = self.config.patience if self.config.patience is not None else self.default_patience
        if j < t:
            return np.zeros(history.rows, dtype=bool)
        tau = self.tau(history)
        if self.config.window == "all":
            return (history.to_earlier(self.config.divergence, j) < tau).sum(axis=0) >= t
        run = history.to_previous(self.config.divergence, j) < tau
        for k in range(1, t):
            run &= history.to_previous(self.config.divergence, j - k) < tau
        return run

    def tau(self, history: ExitHistory) -> np.float32:
        """tau in the unit of S."""
        tau = self.threshold(history)
        if self.config.normalize and self.config.threshold is not None and self._has_entropy(history.problem_type):
            tau *= log_labels(history.num_labels, history.problem_type)
        return np.float32(tau)

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """See the class."""
        if problem_type == "regression":
            return 0.1
        if self.config.divergence == "label":
            return 0.5
        share = {"ce": 0.3, "kl": 0.05, "js": 0.02}[self.config.divergence]
        return share * log_labels(num_labels, problem_type)

    def _has_entropy(self, problem_type: str) -> bool:
        return problem_type != "regression" and self.config.divergence != "label"


class PatiencePolicy(DivergencePolicy):
    """PABEE: stop when t adjacent exits in a row gave the same label (regression: values closer than the threshold).

    It is DGE with `divergence="label"` and `window="consecutive"`. Source: Zhou et al., "BERT Loses Patience", 2020.
    Defaults: t = 2; threshold 0.1 for regression.
    """

    name = "patience"
    default_patience = 2

    def __init__(self, config: EarlyExitConfig | dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.config.divergence, self.config.window = "label", "consecutive"

    def threshold(self, history: ExitHistory) -> float:
        """Only regression has a threshold to choose."""
        return super().threshold(history) if history.problem_type == "regression" else 0.5
