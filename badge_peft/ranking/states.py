"""`StateStore`: what the candidates of a query take from one segment to the next, without padding, within a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Array = np.ndarray


class StateStore:
    """Tensors by name that have a row for each candidate, [N, ...], or one for each of its positions: these lie side
    by side in a buffer that every segment overwrites in place. What is larger than `max_bytes` goes into a temporary
    file, which the system reads and writes in pages. `lengths` [N] are the positions of each candidate."""

    def __init__(self, lengths: Array, max_bytes: int) -> None:
        self.lengths, self.max_bytes = lengths.tolist(), max_bytes
        self._starts = (np.cumsum(lengths) - lengths).tolist()
        self._of_rows: dict[str, Tensor] = {}
        self._of_positions: dict[str, tuple[Tensor, torch.device]] = {}

    def put(self, rows: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Keeps what b `rows` have, [b, ...] or [b, S, d] each."""
        for name, value in values.items():
            if value.dim() < 3:
                if name not in self._of_rows:
                    self._of_rows[name] = value.new_zeros(len(self.lengths), *value.shape[1:])
                self._of_rows[name][torch.tensor(rows, device=value.device)] = value
                continue
            if name not in self._of_positions:
                self._of_positions[name] = self._buffer(value), value.device
            buffer, _ = self._of_positions[name]
            for row, own in zip(rows, value, strict=True):
                start, length = self._starts[row], self.lengths[row]
                buffer[start : start + length] = own[:length].to(buffer.device)

    def names(self) -> set[str]:
        """Of what has been kept so far."""
        return {*self._of_rows, *self._of_positions}

    def get(self, rows: Sequence[int], names: set[str]) -> dict[str, Tensor]:
        """What `rows` have under these names, with zeros behind each but the longest."""
        found = {name: x[torch.tensor(rows, device=x.device)] for name, x in self._of_rows.items() if name in names}
        for name in names & self._of_positions.keys():
            buffer, device = self._of_positions[name]
            parts = [buffer[self._starts[row] : self._starts[row] + self.lengths[row]] for row in rows]
            found[name] = pad_sequence(parts, batch_first=True).to(device)
        return found

    def _buffer(self, like: Tensor) -> Tensor:
        """[all positions, d], of the width, precision and, in memory, device of `like`."""
        count, width = sum(self.lengths), like.shape[-1]
        if count * width * like.element_size() <= self.max_bytes:
            return like.new_empty(count, width)
        with TemporaryFile() as file:  # gone with the last reference to it
            pages = np.memmap(file, dtype=np.uint8, mode="w+", shape=(count, width * like.element_size()))
        return torch.from_numpy(pages).view(like.dtype)
