"""`ExitHistory`: the logits of some rows at the exits so far, the one input of every policy.

It lives on the host, in numpy: a decision needs the logits there anyway (on CUDA that copy is the only
synchronization), and numpy's calls cost a third of torch's on such small arrays. All math is float32 in log-space, so
no logit, however large, gives a NaN. Rows whose logits are NaN or infinite themselves are noted in `finite`, and zeros
stand in for these logits. Arrays are exit-major, [E, n, K], so that one exit's numbers lie side by side and a row's
results do not depend on the other rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit import divergences as div
from badge_peft.utils.problem import infer_problem_type, problem_of

Array = np.ndarray


class ExitHistory:
    """Logits of `n` rows at the exits seen so far, and what policies derive from them.

    Args:
        exits: Block numbers of all exits of the model, shallow to deep.
        rows: n.
        num_labels: K.
        problem_type: As transformers has it; it says which divergence is meant.
        groups: [n], a number for each row: rows of a query have the same. None: all rows are one group.
    """

    def __init__(
        self, exits: Sequence[int], rows: int, num_labels: int, problem_type: str, groups: Array | None = None
    ) -> None:
        self.exits = list(exits)
        self.problem_type = problem_type
        self.problem = problem_of(problem_type)
        self.num_labels = num_labels
        self.groups = groups
        self.seen = 0
        self.logits: Array = np.empty((len(self.exits), rows, num_labels), dtype=np.float32)
        self.finite: Array | None = None  # [E, n] bool, whether all logits are; None: so far they are, in all rows
        self.uncertainty: Array | None = None  # [E, n], what a learned exit layer predicts; NaN where it has not
        self._log_probs: Array = np.empty_like(self.logits)
        self._log_others: Array | None = np.empty_like(self.logits) if self.problem.many_labels else None
        self._cache: dict[tuple[str, int, int, int], Array] = {}

    @classmethod
    def of(
        cls,
        exit_logits: Array,
        exits: Sequence[int],
        problem_type: str,
        uncertainty: Array | None = None,
        groups: Array | None = None,
    ) -> ExitHistory:
        """The history of stored logits [N, E, K], with all exits seen."""
        n, e, k = exit_logits.shape
        history = cls(exits, n, k, problem_type, groups)
        for j in range(e):
            history.append(exit_logits[:, j], None if uncertainty is None else uncertainty[:, j])
        return history

    def append(self, logits: Array, uncertainty: Array | None = None) -> None:
        """Adds the next exit's logits [n, K], and its learned uncertainty [n] where there is one."""
        j = self.seen
        self.logits[j] = logits
        x = self.logits[j]
        finite = np.isfinite(x)
        if not np.logical_and.reduce(finite, axis=None):
            if self.finite is None:
                self.finite = np.ones(self.logits.shape[:2], dtype=bool)
            self.finite[j] = finite.all(axis=-1)
            x[~self.finite[j]] = 0
        if self._log_others is not None:
            div.log_sigmoid(x, out=self._log_probs[j], out_other=self._log_others[j])
        elif self.problem.gives_labels:
            div.log_softmax(x, out=self._log_probs[j])
        if uncertainty is not None:
            if self.uncertainty is None:
                self.uncertainty = np.full(self.logits.shape[:2], np.nan, dtype=np.float32)
            self.uncertainty[j] = np.where(np.isnan(uncertainty), np.float32(np.inf), uncertainty)
        self.seen = j + 1

    def skip(self) -> None:
        """Passes over the next exit, which no decision will read."""
        self.seen += 1

    def keep(self, rows: Array) -> None:
        """Forgets all rows but those that the boolean array `rows` [n] marks."""
        self.logits = self.logits[:, rows]
        if self.finite is not None:
            self.finite = self.finite[:, rows]
        if self.uncertainty is not None:
            self.uncertainty = self.uncertainty[:, rows]
        self._log_probs = self._log_probs[:, rows]
        if self._log_others is not None:
            self._log_others = self._log_others[:, rows]
        if self.groups is not None:
            self.groups = self.groups[rows]
        self._cache = {}

    def of_rows(self, rows: Array) -> ExitHistory:
        """A history of the rows that `rows` marks ([n] bool) or names (indices), with what has been derived of them;
        this one stays as it is."""
        part = copy.copy(self)
        part.keep(rows)
        part._cache = {key: found[:, rows] for key, found in self._cache.items()}
        return part

    def in_groups(self, groups: Array | None) -> ExitHistory:
        """The same rows in other groups [n]; what has been derived is shared."""
        other = copy.copy(self)
        other.groups = groups
        return other

    @property
    def rows(self) -> int:
        """n."""
        return self.logits.shape[1]

    def log_probs(self, j: int) -> Array:
        """[n, K]: log p of exit j (index); single-label."""
        return self._log_probs[j]

    def to_earlier(self, kind: str, j: int) -> Array:
        """[j, n]: S(p_j, p_i) for every earlier exit i < j (Eq. 4)."""
        return self._divergence(kind, j, 0, j)

    def to_previous(self, kind: str, j: int) -> Array:
        """[n]: S(p_j, p_{j-1})."""
        return self._divergence(kind, j, j - 1, j)[0]

    def to(self, kind: str, j: int, i: int) -> Array:
        """[n]: S(p_j, p_i)."""
        return self._divergence(kind, j, i, i + 1)[0]

    def entropy(self, j: int) -> Array:
        """[n]: entropy of exit j in nats; multi-label: the sum over labels."""
        return self._divergence("ce", j, j, j + 1)[0]

    def confidence(self, j: int) -> Array:
        """[n]: the largest probability of exit j; multi-label: that of the least sure label."""
        if self._log_others is None:
            return np.exp(self._log_probs[j].max(axis=-1))
        return np.exp(np.maximum(self._log_probs[j], self._log_others[j]).min(axis=-1))

    def margin(self, j: int) -> Array:
        """[n]: how far the largest probability of exit j lies above the next; multi-label: that of the least sure
        label above its complement."""
        if self._log_others is not None:
            return 2 * self.confidence(j) - 1
        if self.num_labels == 1:
            return self.confidence(j)
        top = np.partition(self._log_probs[j], -2, axis=-1)[:, -2:]
        return np.exp(top[:, 1]) - np.exp(top[:, 0])

    def _divergence(self, kind: str, j: int, first: int, end: int) -> Array:
        """[end - first, n]: S(p_j, p_i) for these exits i."""
        key = (kind, j, first, end)
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._compute(kind, j, slice(first, end))
        return found

    def _compute(self, kind: str, j: int, others: slice) -> Array:
        if not self.problem.gives_labels:
            return div.distance(self.logits[j], self.logits[others])
        if kind == "label":
            return div.label(self.logits[j], self.logits[others], self.problem_type)
        if self._log_others is None:
            return div.categorical(kind, self._log_probs[j], self._log_probs[others])
        return div.categorical(kind, self._log_probs[j], self._log_probs[others]) + div.categorical(
            kind, self._log_others[j], self._log_others[others]
        )


def as_history(
    exit_logits: Any,
    exit_layers: Sequence[int] | None,
    problem_type: str | None,
    uncertainty: Any = None,
    groups: Any = None,
) -> ExitHistory:
    """An `ExitHistory` from whatever `replay` accepts."""
    if hasattr(exit_logits, "history"):  # ExitLogits
        history = exit_logits.history()
        return history if groups is None else history.in_groups(group_codes(groups, history.rows))
    logits = _numpy(exit_logits)
    if logits.ndim != 3:
        raise ValueError(f"exit_logits must be [N, E, K], got shape {list(logits.shape)}.")
    exits = list(exit_layers) if exit_layers is not None else list(range(1, logits.shape[1] + 1))
    if len(exits) != logits.shape[1] or sorted(set(exits)) != exits:
        raise ValueError(f"exit_layers={exits} must be {logits.shape[1]} increasing block numbers.")
    if problem_type is None:
        problem_type = infer_problem_type(logits.shape[2])
    seen = None if uncertainty is None else _numpy(uncertainty)
    if seen is not None and seen.shape != logits.shape[:2]:
        raise ValueError(f"uncertainty must be {list(logits.shape[:2])}, got shape {list(seen.shape)}.")
    return ExitHistory.of(logits, exits, problem_type, seen, group_codes(groups, len(logits)))


def group_codes(groups: Any, rows: int) -> Array | None:
    """[n] whole numbers, the same for rows of one group; None stands for one group of all rows."""
    if groups is None:
        return None
    given = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    ids = np.asarray(given)
    if ids.shape != (rows,):
        raise ValueError(
            f"groups has shape {list(ids.shape)} for {rows} rows: give one id for each row, such as the number of its "
            "query."
        )
    if ids.dtype.kind == "f" and np.isnan(ids).any():
        raise ValueError("groups has a NaN, which is no id: give one for each row, such as the number of its query.")
    try:
        if ids.dtype.kind == "U" and not all(isinstance(each, str) for each in given):
            raise TypeError  # of which numpy has made strings, the same one of 1 and "1"
        return np.unique(ids, return_inverse=True)[1].reshape(rows)
    except TypeError:
        kinds = ", ".join(sorted({type(each).__name__ for each in given}))
        raise ValueError(f"groups has ids of several kinds ({kinds}): give numbers alone, or strings alone.") from None


def _numpy(values: Any) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)
