"""`StateStore`: the states of a query's candidates between two segments, without padding and within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Array = np.ndarray


class LeftStates:
    """What exits leave for the deeper ones (`ExitState.left`), of each candidate, between two segments.

    Args:
        lengths: [N], positions of each candidate.
        max_bytes: As for `StateStore`.
    """

    def __init__(self, lengths: Array, max_bytes: int) -> None:
        self.lengths = lengths
        self.max_bytes = max_bytes
        self._of_rows: dict[str, Tensor] = {}  # [N, ...]
        self._of_positions: dict[str, StateStore] = {}

    def put(self, rows: Sequence[int], left: dict[str, Tensor]) -> None:
        """Keeps `left`, [b, ...] or [b, S, ...] each, of `rows`, b of them."""
        for name, value in left.items():
            if value.dim() > 2:
                if name not in self._of_positions:
                    everyone = np.arange(len(self.lengths))
                    self._of_positions[name] = StateStore(self.lengths, everyone, value, self.max_bytes)
                self._of_positions[name].put(rows, value)
                continue
            if name not in self._of_rows:
                self._of_rows[name] = value.new_zeros(len(self.lengths), *value.shape[1:])
            self._of_rows[name][torch.tensor(rows, device=value.device)] = value

    def get(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Those of `rows`."""
        found = {name: x[torch.tensor(rows, device=x.device)] for name, x in self._of_rows.items()}
        return found | {name: store.get(rows) for name, store in self._of_positions.items()}


class StateStore:
    """H_m [S_c, d] of each candidate c, side by side in one buffer that every segment overwrites in place.

    Args:
        lengths: [N], positions of each candidate.
        rows: Numbers of the candidates that have states.
        like: States [b, S, d] of some of them: their width, precision and device.
        max_bytes: In memory; what is larger goes into a temporary file, which the system reads and writes in pages.
    """

    def __init__(self, lengths: Array, rows: Array, like: Tensor, max_bytes: int) -> None:
        self.lengths = lengths
        self.device = like.device
        ends = np.cumsum(lengths[rows])
        self._starts = dict(zip(rows.tolist(), (ends - lengths[rows]).tolist(), strict=True))
        shape = (int(ends[-1]), like.shape[-1])
        self.in_file = shape[0] * shape[1] * like.element_size() > max_bytes
        if self.in_file:
            # gone with the last reference to it
            with TemporaryFile() as file:
                pages = np.memmap(file, dtype=np.uint8, mode="w+", shape=(shape[0], shape[1] * like.element_size()))
            self.buffer = torch.from_numpy(pages).view(like.dtype)
        else:
            self.buffer = like.new_empty(shape)

    def put(self, rows: Sequence[int], states: Tensor) -> None:
        """Keeps the states [b, S, d] of `rows`, b of them."""
        for row, value in zip(rows, states, strict=True):
            start, length = self._starts[row], int(self.lengths[row])
            self.buffer[start : start + length] = value[:length].to(self.buffer.device)

    def get(self, rows: Sequence[int]) -> Tensor:
        """[b, S, d]: those of `rows`, with zeros behind each but the longest."""
        parts = [self.buffer[self._starts[row] : self._starts[row] + int(self.lengths[row])] for row in rows]
        return pad_sequence(parts, batch_first=True).to(self.device)
