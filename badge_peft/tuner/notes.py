"""`Notes`: what the exits of one call leave for one another (Global Past-Future), and for the objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Notes:
    """Per-row sums over the exits so far, and the exits themselves in order.

    Args:
        exits: The exits of the call, shallow to deep.
        keep: Also keep what a training objective compares (representations and guesses).
    """

    def __init__(self, exits: list[nn.Module], keep: bool = False) -> None:
        self.exits = exits
        self.keep = keep
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.vectors: dict[int, Tensor] = {}  # index of the exit -> v_j
        self.guesses: dict[tuple[int, int], Tensor] = {}  # (i, j) -> exit i's guess of v_j

    def add(self, name: str, value: Tensor, for_later: Tensor) -> Tensor:
        """The sum of `name` up to this exit; later exits see `for_later` in place of `value`."""
        before = self.sums.get(name)
        self.sums[name] = for_later if before is None else before + for_later
        self.counts[name] = self.counts.get(name, 0) + 1
        return value if before is None else before + value

    def count(self, name: str) -> int:
        """How many exits `add` has seen."""
        return self.counts[name]

    def behind(self, exit_: nn.Module) -> list[nn.Module]:
        """The exits deeper than `exit_`."""
        return self.exits[self._index(exit_) + 1 :]

    def keep_vector(self, exit_: nn.Module, vector: Tensor) -> None:
        """Keeps v_j for the objective."""
        if self.keep and self.exits:
            self.vectors[self._index(exit_)] = vector

    def keep_guess(self, exit_: nn.Module, later: nn.Module, guess: Tensor) -> None:
        """Keeps a guess for the objective."""
        if self.keep:
            self.guesses[self._index(exit_), self._index(later)] = guess

    def rows(self, index: Tensor) -> None:
        """Goes on with the rows `index` alone."""
        self.sums = {name: torch.index_select(value, 0, index) for name, value in self.sums.items()}

    def _index(self, exit_: nn.Module) -> int:
        return next(i for i, known in enumerate(self.exits) if known is exit_)
