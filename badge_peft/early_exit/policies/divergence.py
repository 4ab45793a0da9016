"""DGE (Eq. 3-4), and PABEE's patience as its special case."""

from __future__ import annotations

from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, max_entropy
from badge_peft.early_exit.policies.threshold import ThresholdPolicy


class DivergencePolicy(ThresholdPolicy):
    """Divergence-based early exiting: stop at block m when at least t earlier exits predicted a distribution close to
    p_m, which means at a divergence below tau.

        cnt_m = #{ i < m : S(p_m, p_i) < tau };  stop at the first m with cnt_m >= t        (Eq. 3)

    `window="all"` is Eq. 3. `window="consecutive"` counts the unbroken run of adjacent agreements
    S(p_j, p_{j-1}) < tau that ends at m. The score is the t-th smallest divergence (`all`), or the largest of the
    last t (`consecutive`): it lies below tau exactly where the count reaches t. Source: BADGE, section 3.2.

    Defaults: t = 1; tau = 0.3 ln K for `ce` (which has to exceed the entropy of the prediction itself), 0.05 ln K for
    `kl`, 0.02 ln K for `js`, 0.5 for `label`; K independent labels count K ln 2 in place of ln K; 0.1 for regression,
    where S = |y_m - y_i|. With `normalize=True` tau is a share of ln K.
    """

    name = "divergence"
    default_patience = 1

    @property
    def patience(self) -> int:
        """t."""
        return self.config.patience if self.config.patience is not None else self.default_patience

    def lookback(self) -> int | None:
        """All exits, or t of them."""
        return None if self.config.window == "all" else self.patience

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: the smallest tau that would stop a row at exit j."""
        t, kind = self.patience, self.config.divergence
        if j < t:
            return self.never_exits(history)
        if self.config.window == "all":
            earlier = history.to_earlier(kind, j)  # [j, n]
            return np.minimum.reduce(earlier, axis=0) if t == 1 else np.partition(earlier, t - 1, axis=0)[t - 1]
        run = history.to_previous(kind, j)
        for k in range(1, t):
            run = np.maximum(run, history.to_previous(kind, j - k))
        return run

    def in_nats(self, problem_type: str) -> bool:
        """Not for `label` and regression."""
        return problem_type != "regression" and self.config.divergence != "label"

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """See the class."""
        if problem_type == "regression":
            return 0.1
        if self.config.divergence == "label":
            return 0.5
        share = {"ce": 0.3, "kl": 0.05, "js": 0.02}[self.config.divergence]
        return share * max_entropy(num_labels, problem_type)


class PatiencePolicy(DivergencePolicy):
    """PABEE: stop when t adjacent exits in a row gave the same label (regression: values closer than the threshold).

    It is DGE with `divergence="label"` and `window="consecutive"`. Source: Zhou et al., "BERT Loses Patience", 2020.
    Defaults: t = 2; threshold 0.1 for regression.
    """

    name = "patience"
    default_patience = 2

    def __init__(self, config: EarlyExitConfig | dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__(config, **{**fields, "divergence": "label", "window": "consecutive"})

    def threshold(self, history: ExitHistory) -> float:
        """Only regression has a threshold to choose."""
        return super().threshold(history) if history.problem_type == "regression" else 0.5
