"""A sequential test that watches for as long as a service runs: has a share risen above what was promised?

A Shiryaev-Roberts e-detector of Bernoulli likelihood ratios: R = (R + 1) L for each new row, where L is what a bet on
a larger share pays, at most 1 in the mean while the promise holds. R less the number of rows is then a
supermartingale, so with a limit c on R the probability of an alarm within n rows is at most n / c, and c rows pass
before a false one in the mean, whatever the share below the promise. The mean of several such R, for several larger
shares and several promises, has the same property. It needs no window.

Source: Shin, Ramdas and Rinaldo, "E-detectors: A Nonparametric Framework for Sequential Change Detection", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
ODDS = (1.5, 2.0, 3.0, 5.0, 10.0)  # a bet for each factor by which the odds may have risen
_LARGEST = 1e300  # R stays a finite number in JSON


class RateDetector:
    """Evidence that one of several shares lies above its promise.

    Args:
        count: How many shares are watched.
    """

    def __init__(self, count: int) -> None:
        self.values = np.zeros((count, len(ODDS)))

    def update(self, happened: Array, promised: Array) -> float:
        """Takes one row.

        Args:
            happened: [count] bool.
            promised: [count], the largest share that keeps the promise, at the setting that answered the row. Where it
                is 1 or more, nothing can break it, and nothing is added.

        Returns:
            The evidence: to be compared with the limit c.
        """
        p = np.clip(promised, 1e-6, 1.0)[:, None]
        odds = np.array(ODDS)
        bet = odds * p / (1 + (odds - 1) * p)  # the larger share whose odds are so many times those of p
        with np.errstate(invalid="ignore", divide="ignore"):
            pays = np.where(np.asarray(happened)[:, None], bet / p, (1 - bet) / (1 - p))
            grown = np.minimum((self.values + 1) * pays, _LARGEST)
        self.values = np.where(p < 1, grown, self.values)
        return self.evidence

    @property
    def evidence(self) -> float:
        """The mean of all R."""
        return float(self.values.mean()) if self.values.size else 0.0

    def to_list(self) -> list[list[float]]:
        """For JSON."""
        return self.values.tolist()

    def load(self, values: Sequence[Sequence[float]]) -> None:
        """What `to_list` gave.

        Raises:
            ValueError: it is of another number of shares, or holds what is no evidence.
        """
        array = np.asarray(values, dtype=np.float64)
        if array.shape != self.values.shape or not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(
                f"evidence of shape {list(array.shape)} does not fit: it must be {list(self.values.shape)}."
            )
        self.values = array
