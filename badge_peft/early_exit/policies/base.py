"""`ExitPolicy`: one definition of a stopping rule, used live and on stored logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory

Array = np.ndarray


class ExitPolicy:
    """A stopping rule. Subclasses say in `should_exit` which rows may stop; everything else is here.

    A policy keeps no state between calls: a decision is a function of the history of exits, so the live pass and the
    replay of stored logits cannot differ.

    Args:
        config: The config; `None` takes the defaults.
        **fields: Fields of `EarlyExitConfig`, which win over `config`.
    """

    name: ClassVar[str]

    #: Whether `should_exit` reads the doubts that a learned exit layer predicts.
    reads_uncertainty: ClassVar[bool] = False

    def __init__(self, config: EarlyExitConfig | dict[str, Any] | None = None, **fields: Any) -> None:
        self.config = EarlyExitConfig.of(config, **{"policy": self.name, **fields})

    def should_exit(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: the rows that may stop at exit j (index), from the exits up to j."""
        raise NotImplementedError

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """The threshold that `threshold=None` stands for."""
        raise NotImplementedError(f"{self.name} has no threshold")

    def threshold(self, history: ExitHistory) -> float:
        """The threshold in force for this model."""
        if self.config.threshold is not None:
            return self.config.threshold
        return self.default_threshold(history.num_labels, history.problem_type)

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses a config that cannot work for a model with these exits, before anything runs.

        Raises:
            ValueError: `min_exit`, `max_exit` or `depth` lies outside of the model.
        """
        last = exits[-1]
        for name in ("min_exit", "max_exit"):
            value = getattr(self.config, name)
            if value is not None and value > last:
                raise ValueError(f"{name}={value} is not allowed: the model has {last} blocks.")
        cap = self.config.max_exit
        if cap is not None and cap < exits[0]:
            raise ValueError(f"max_exit={cap} is not allowed: the first exit is at block {exits[0]}.")

    def is_final(self, exits: Sequence[int], j: int) -> bool:
        """Whether every row that comes to exit j (index) stops there, whatever the logits are: the last exit, or the
        last up to `max_exit`."""
        cap = self.config.max_exit
        return j == len(exits) - 1 or (cap is not None and exits[j + 1] > cap)

    def can_exit(self, exits: Sequence[int], j: int) -> bool:
        """Whether a row may stop at exit j (index): not before `min_exit`, and at every `decide_every`-th exit."""
        low = self.config.min_exit
        due = (j + 1) % self.config.decide_every == 0 and (low is None or exits[j] >= low)
        return due or self.is_final(exits, j)

    def needs_logits(self, exits: Sequence[int], j: int) -> bool:
        """Whether anything depends on the logits of exit j (index): they can be an answer, or `should_exit` looks
        at them. An exit for which this is False need not be computed."""
        if self.can_exit(exits, j):
            return True
        back = self.lookback()
        behind = len(exits) if back is None else min(len(exits), j + 1 + back)
        for i in range(j + 1, behind):
            if self.is_final(exits, i):
                return False
            if self.can_exit(exits, i):
                return True
        return False

    def lookback(self) -> int | None:
        """How many exits before j `should_exit` looks at; None: all of them."""
        return None

    def stops(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: the rows that stop at exit j (index). The last exit (or the last up to `max_exit`) answers."""
        if self.is_final(history.exits, j):
            return np.ones(history.rows, dtype=bool)
        if not self.can_exit(history.exits, j):
            return np.zeros(history.rows, dtype=bool)
        return self.should_exit(history, j)

    def replay(
        self,
        exit_logits: Any,
        exit_layers: Sequence[int] | None = None,
        problem_type: str | None = None,
        uncertainty: Any = None,
    ) -> torch.Tensor:
        """The block at which each row stops, from stored logits: what the live pass would have done.

        Args:
            exit_logits: [N, E, K], a tensor or array, or an `ExitLogits`, which knows the rest.
            exit_layers: Block numbers of the E exits; None means 1 to E.
            problem_type: None means regression for K = 1, else single-label classification.
            uncertainty: [N, E], what `learned` reads.

        Returns:
            [N] long: block numbers, as in `EarlyExitOutput.exit_layer`.
        """
        history = as_history(exit_logits, exit_layers, problem_type, uncertainty)
        return torch.from_numpy(self.replay_history(history))

    def replay_history(self, history: ExitHistory) -> Array:
        """[N]: as `replay`, on a history whose derived numbers are shared between calls."""
        self.check(history.exits, history.num_labels, history.problem_type)
        answer = np.full(history.rows, -1, dtype=np.int64)
        for j, block in enumerate(history.exits):
            answer[(answer < 0) & self.stops(history, j)] = block
            if (answer >= 0).all():
                break
        return answer


def as_history(
    exit_logits: Any, exit_layers: Sequence[int] | None, problem_type: str | None, uncertainty: Any = None
) -> ExitHistory:
    """An `ExitHistory` from whatever `replay` accepts.

    Raises:
        ValueError: the logits are not [N, E, K], or `exit_layers` does not match them.
    """
    if hasattr(exit_logits, "history"):  # ExitLogits
        return exit_logits.history()
    logits = _numpy(exit_logits)
    if logits.ndim != 3:
        raise ValueError(f"exit_logits must be [N, E, K], got shape {list(logits.shape)}.")
    exits = list(exit_layers) if exit_layers is not None else list(range(1, logits.shape[1] + 1))
    if len(exits) != logits.shape[1] or sorted(set(exits)) != exits:
        raise ValueError(f"exit_layers={exits} must be {logits.shape[1]} increasing block numbers.")
    if problem_type is None:
        problem_type = "regression" if logits.shape[2] == 1 else "single_label_classification"
    return ExitHistory.of(logits, exits, problem_type, None if uncertainty is None else _numpy(uncertainty))


def max_entropy(num_labels: int, problem_type: str) -> float:
    """The largest entropy: ln K, or K ln 2 for K independent labels."""
    return num_labels * math.log(2) if problem_type == "multi_label_classification" else math.log(max(num_labels, 2))


def _numpy(values: Any) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)
