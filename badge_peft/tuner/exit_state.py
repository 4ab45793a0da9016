"""`ExitState`: what the exits of one call leave for the deeper ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExitState:
    """What the exits of one call leave for the deeper ones, and for its objective. It belongs to the rows: those that
    leave take theirs with them.

    Args:
        exits: Of the call, shallow to deep, where each needs all others (Global Past-Future); else empty.

    Attributes:
        left: What the exits so far have left, by name: [n, ...], or [n, S, ...] where each position has its own.
        keeps_vectors: Whether the vectors and predictions that the objective compares are kept.
    """

    def __init__(self, exits: Sequence[nn.Module] = ()) -> None:
        self.exits = list(exits)
        self.left: dict[str, Tensor] = {}
        self.keeps_vectors = False
        self.vectors: dict[int, Tensor] = {}  # index of the exit -> v_j
        self.predictions: dict[tuple[int, int], Tensor] = {}  # (i, j) -> what exit i takes v_j to be

    def from_before(self, name: str, like: Tensor) -> Tensor:
        """What the exit before has left, where `like` is and in its precision, as `finite` has it."""
        return finite(self.left[name].to(like))

    def add(self, name: str, value: Tensor, for_later: Tensor) -> Tensor:
        """The sum of `name` up to this exit; deeper exits see `for_later` in place of `value`."""
        before = self.left.get(name)
        before = before if before is None else before.to(value.device)
        self.left[name] = for_later if before is None else before + for_later
        return value if before is None else before + value

    def keep_rows(self, index: Tensor, length: int | None = None) -> None:
        """Goes on with the rows `index` alone, and with their first `length` positions (None: all)."""
        for name, value in self.left.items():
            if length is not None and value.dim() > 2:
                value = value[:, :length]
            self.left[name] = torch.index_select(value, 0, index.to(value.device))


def finite(left: Tensor) -> Tensor:
    """What an exit has left for others. NaN and infinity count as 0: they say nothing, and would spread to all deeper
    exits."""
    return left.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
