"""Medians, spreads, and paired differences with their confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from statistics import mean, median, stdev

from scipy import stats

LEVEL = 0.95


@dataclass
class Paired:
    """The differences between two methods over what both have: seeds, or pairs of task and seed."""

    differences: list[float]

    @property
    def mean(self) -> float:
        return mean(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean, by Student's t; None for fewer than two pairs."""
        n = len(self.differences)
        if n < 2:
            return None
        half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * stdev(self.differences) / n**0.5
        return self.mean - half, self.mean + half

    @property
    def text(self) -> str:
        """`+1.2 [0.3, 2.1] (3)`: mean, interval, pairs."""
        interval = self.interval
        bounds = "[one pair: no interval]" if interval is None else f"[{interval[0]:+.1f}, {interval[1]:+.1f}]"
        return f"{self.mean:+.1f} {bounds} ({len(self.differences)})"

    def verdict(self, expected: int = 1) -> str:
        """Whether an ordering that the paper reports is found here; `expected` is 1 where it has the first method
        ahead."""
        ahead = self.mean * expected > 0
        interval = self.interval
        if interval is None:
            return f"{'same' if ahead else '**not** the same'} direction, one pair: not settled"
        clear = interval[0] * interval[1] > 0
        if ahead:
            return "holds" if clear else "same direction, but the interval includes 0: not settled"
        return "does **not** hold: " + ("the opposite, clearly" if clear else "no gain here, the interval includes 0")


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
    """`first` minus `second` over the keys that both have; None where there are none, or none that is a number."""
    found = [first[k] - second[k] for k in first if k in second]
    found = [difference for difference in found if not isnan(difference)]
    return Paired(found) if found else None


def summary(scores: dict[int, float]) -> str:
    """`86.0 (85.1-86.9)`: the median over seeds and the range."""
    values = list(scores.values())
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f} (1 seed)"
    return f"{median(values):.1f} ({min(values):.1f}-{max(values):.1f})"
