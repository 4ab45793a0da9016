"""DGE (Eq. 3-4), and PABEE's patience as its special case."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from badge_peft.early_exit.config import DIVERGENCES, WINDOWS, EarlyExitConfig, register_policy
from badge_peft.early_exit.divergences import max_entropy
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.utils.problem import problem_of


@register_policy
class DivergencePolicy(ThresholdPolicy):
    """Divergence-based early exiting: stop at block m when at least t earlier exits predicted a distribution close to
    p_m, which means at a divergence below tau.

        cnt_m = #{ i < m : S(p_m, p_i) < tau };  stop at the first m with cnt_m >= t        (Eq. 3)

    `window="all"` is Eq. 3. `window="consecutive"` counts the unbroken run of adjacent agreements
    S(p_j, p_{j-1}) < tau that ends at m. The score is the t-th smallest divergence (`all`), or the largest of the
    last t (`consecutive`): it lies below tau exactly where the count reaches t. Where each exit has a threshold of its
    own, it is that of the exit that decides (`all`), and of each exit of the run (`consecutive`). Source: BADGE,
    section 3.2.

    Defaults: t = 1; tau = 0.3 ln K for `ce` (which has to exceed the entropy of the prediction itself), 0.05 ln K for
    `kl`, 0.02 ln K for `js`, 0.5 for `label`; K independent labels count K ln 2 in place of ln K; 0.1 for regression,
    where S = |y_m - y_i|.
    """

    name = "divergence"
    own_fields: ClassVar[tuple[str, ...]] = ("divergence", "window")
    counts_exits = True
    default_patience = 1
    in_default_sweep = True
    counts_labels = False

    @property
    def kind(self) -> str:
        """The divergence, a name in `DIVERGENCES`."""
        return self.config.divergence

    @property
    def consecutive(self) -> bool:
        """Whether only the unbroken run of adjacent agreements counts."""
        return self.config.window == "consecutive"

    @property
    def decides_alone(self) -> bool:
        """Where no run of exits counts."""
        return not self.consecutive

    def lookback(self) -> int | None:
        """All exits, or t of them."""
        return self.patience if self.consecutive else None

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: the smallest tau that would stop a row at exit j."""
        t, kind = self.patience, self.kind
        if j < t:
            return self.never_exits(history)
        if not self.consecutive:
            earlier = history.to_earlier(kind, j)  # [j, n]
            return np.minimum.reduce(earlier, axis=0) if t == 1 else np.partition(earlier, t - 1, axis=0)[t - 1]
        run = history.to_previous(kind, j)
        for k in range(1, t):
            run = np.maximum(run, history.to_previous(kind, j - k))
        return run

    def should_exit_each(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: in a run of exits, each is compared with its own threshold."""
        if not self.consecutive:
            return super().should_exit_each(history, j)
        if j < self.patience:
            return np.zeros(history.rows, dtype=bool)
        return self._all_below(history, [history.to_previous(self.kind, j - k) for k in range(self.patience)], j)

    def nodes(self, at: Any) -> Any:
        """The count of Eq. 3, or the run of adjacent agreements: patience is an input of the graph."""
        kind = self.kind
        here, earlier = at.represent(kind), at.kept("history")  # [n, 1, W], [n, j, W] or the last alone
        if earlier is None:
            at.append("history", here)
            return None
        close = at.op("Less", at.divergence(kind, here, earlier), at.beside(at.threshold))  # [n, j] or [n, 1]
        if not self.consecutive:
            at.append("history", here)
            return at.op("GreaterOrEqual", at.total(at.as_int(close)), at.patience)
        at.keep("history", here, axes=3)
        return at.run_of(at.op("Squeeze", close, at.ints([1])))

    # -------------------------------------------------------------------------------------------------- the threshold

    def in_nats(self, problem_type: str) -> bool:
        """Not for `label` and regression."""
        return problem_of(problem_type).gives_labels and self.kind != "label"

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        if not problem_of(problem_type).gives_labels:
            return 0.1
        if self.kind == "label":
            return 0.5
        share = {"ce": 0.3, "kl": 0.05, "js": 0.02}[self.kind]
        return share * max_entropy(num_labels, problem_type)

    def largest_score(self, num_labels: int, problem_type: str, widest: float | None) -> float | None:
        """Twice the largest entropy for `ce`, where there are two terms; the largest value of the others. None where
        the same label or another is all there is."""
        problem = problem_of(problem_type)
        if not problem.gives_labels:
            return widest or 1.0
        if self.kind == "label":
            return float(num_labels) if problem.many_labels else None
        most = max_entropy(num_labels, problem_type)
        return {"ce": 2 * most, "kl": most, "js": (num_labels if problem.many_labels else 1) * math.log(2)}[self.kind]

    @classmethod
    def templates(cls, problem_type: str) -> list[EarlyExitConfig]:
        """Every divergence with both windows; values have one distance."""
        kinds = DIVERGENCES if problem_of(problem_type).gives_labels else DIVERGENCES[:1]
        return [EarlyExitConfig(policy=cls.name, divergence=d, window=w) for d in kinds for w in WINDOWS]

    @classmethod
    def title(cls, config: EarlyExitConfig) -> str:
        """With the divergence, and the window where it is not all."""
        window = "" if config.window == "all" else f", window={config.window}"
        return f"{cls.name} ({config.divergence}){window}"


@register_policy
class PatiencePolicy(DivergencePolicy):
    """PABEE: stop when t adjacent exits in a row gave the same label (regression: values closer than the threshold).

    It is DGE with `divergence="label"` and `window="consecutive"`. Source: Zhou et al., "BERT Loses Patience", 2020.
    Defaults: t = 2; threshold 0.1 for regression.
    """

    name = "patience"
    own_fields = ()
    default_patience = 2
    kind = "label"
    consecutive = True

    def uses_threshold(self, problem_type: str) -> bool:
        """Only regression has a threshold to choose."""
        return not problem_of(problem_type).gives_labels

    @classmethod
    def templates(cls, problem_type: str) -> list[EarlyExitConfig]:
        return [EarlyExitConfig(policy=cls.name)]

    @classmethod
    def title(cls, config: EarlyExitConfig) -> str:
        return cls.name

    @classmethod
    def label(cls, config: EarlyExitConfig) -> str:
        """With the patience where a threshold is set: without one, the patience is what varies along the curve."""
        return cls.name if config.threshold is None or config.patience is None else f"{cls.name} t={config.patience}"
