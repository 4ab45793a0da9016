"""`RaggedRows`: rows of vectors, as many for each row as it needs, without padding, in memory or in a mapped file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from badge_peft.utils import distributed


class RaggedRows:
    """Row i is [C, n_i, d], side by side with its neighbors, so that one read finds all of it, in memory or
    (`is_mapped`) in a memory-mapped file."""

    def __init__(self, counts: Sequence[int], channels: int, width: int, dtype: torch.dtype) -> None:
        self.counts = list(counts)
        self.channels = channels
        self.width = width
        self.dtype = dtype
        self._starts = [0]
        for count in self.counts:
            self._starts.append(self._starts[-1] + count * channels * width)
        self._file: Path | None = None  # one that is still to be removed
        self._values = torch.empty(0, dtype=dtype)
        self.is_mapped = False

    @property
    def nbytes(self) -> int:
        """What the numbers take."""
        return self._starts[-1] * self.dtype.itemsize

    def allocate(self, folder: Path | None = None) -> None:
        """Makes room for the rows, in memory or in a memory-mapped file in `folder`. Several processes that each make
        the same call with a folder share one file, and what one of them puts all of them read."""
        size = self._starts[-1]
        self.is_mapped = folder is not None
        if size:
            self._values = torch.empty(size, dtype=self.dtype) if folder is None else self._mapped(size, folder)

    def put(self, row: int, value: Tensor) -> None:
        """Stores `value` [C, n_i, d] as row `row`."""
        self._row(row).copy_(value)

    def batch(self, rows: Sequence[int], length: int, dtype: torch.dtype) -> Tensor:
        """[C, B, length, d]: the given rows, zero behind the end of each."""
        found = torch.empty(self.channels, len(rows), length, self.width, dtype=dtype)
        for b, row in enumerate(rows):
            count = self.counts[row]
            found[:, b, :count].copy_(self._row(row))
            if count < length:
                found[:, b, count:].zero_()
        return found

    def close(self) -> None:
        """Gives memory and file back; the rows are gone."""
        self._values = self._values.new_empty(0)
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None

    def _row(self, row: int) -> Tensor:
        values = self._values[self._starts[row] : self._starts[row + 1]]
        return values.view(self.channels, self.counts[row], self.width)

    def _mapped(self, size: int, folder: Path) -> Tensor:
        """A tensor in a new file that loses its name at once: nothing is left of it, however the process ends."""
        nbytes = size * self.dtype.itemsize
        path = Path(distributed.on_main(lambda: str(_new_file(folder, nbytes))))
        if distributed.rank_world()[1] > 1 and not all(distributed.gather([path.is_file()])):
            distributed.on_main(path.unlink)
            raise OSError(f"{folder} is not a folder that all processes share.")
        values = torch.from_file(str(path), shared=True, size=size, dtype=self.dtype)
        distributed.gather([None])  # every process has it open
        if distributed.is_main():
            try:
                path.unlink()
            except OSError:  # Windows keeps the name of a file that is open
                self._file = path
        return values


def _new_file(folder: Path, nbytes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{uuid4().hex}.states"
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk would end the process later
            else:
                file.truncate(nbytes)
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise
    return path
