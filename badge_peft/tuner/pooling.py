"""From the states of a sequence [B, S, d] to the one vector [B, d] that an exit reads.

A bypass, its LayerNorm and a linear exit act on each position alone, so where the pooling picks one position (CLS,
last token) we pick first and compute afterwards: the same numbers for one position instead of S.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The kind of pooling that does not pool.
TOKENS = "tokens"


class Pooling:
    """One call's pooling: `pick` before the position-wise math, `reduce` after it.

    Of a mask [B, S] (None: every position is real), `cls` is position 0, `mean` goes over all, `last` is the last
    one, and `tokens` leaves all as they are, for exits that answer each token.
    """

    def __init__(self, kind: str, attention_mask: Tensor | None) -> None:
        self.kind = kind
        self.mask = attention_mask
        self._index: Tensor | None = None
        self._weights: Tensor | None = None

    def pick(self, states: Tensor) -> Tensor:
        """[B, S, d] -> [B, d] for `cls` and `last`; unchanged for `mean` and `tokens`."""
        if self.kind == "cls":
            return states.select(1, 0)  # as [:, 0], in half the time
        if self.kind in ("mean", TOKENS):
            return states
        if self.mask is None:
            return states[:, -1]
        if self._index is None:
            positions = torch.arange(self.mask.shape[1], device=self.mask.device)
            self._index = (positions * (self.mask != 0)).amax(dim=1)  # [B], also right for left padding
        return states[torch.arange(states.shape[0], device=states.device), self._index]

    def reduce(self, states: Tensor) -> Tensor:
        """[..., B, S, d] -> [..., B, d] for `mean`; what `pick` has picked stays as it is."""
        if self.kind != "mean":
            return states
        if self.mask is None:
            return states.mean(dim=-2)
        multiply = torch.bmm if states.dim() == 3 else torch.matmul
        return multiply(self.weights(states).unsqueeze(1), states).squeeze(-2)

    def weights(self, states: Tensor) -> Tensor:
        """[B, S], for the mean over the positions of `states` [B, S, d]: 0 at padding, else they add up to 1."""
        if self.mask is None:
            return states.new_full(states.shape[:2], 1 / states.shape[1])
        if self._weights is None:
            real = (self.mask != 0).to(states.dtype)
            self._weights = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        return self._weights.to(states.dtype)

    def rows(self, index: Tensor, length: int | None = None) -> Pooling:
        """The pooling of the rows `index` [b] alone, and of their first `length` positions (None: all)."""
        if self.mask is None:
            return Pooling(self.kind, None)
        rows = self.mask.index_select(0, index)
        return Pooling(self.kind, rows if length is None else rows[:, :length])
