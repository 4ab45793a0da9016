"""Traffic: how many requests come when, and how hard they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
USUAL = 0.25  # share of hard texts in the evaluation's rows, by definition


@dataclass(frozen=True)
class Traffic:
    """Poisson arrivals with a rate that changes.

    Args:
        name: On the page.
        seconds: How long.
        shape: The rate at a moment [n] of `seconds`, as a share of the peak [n].
        hard: Share of hard texts at a moment.
        recorded: Moments of the requests, in the place of drawn ones.
        grace: Seconds after the end in which requests may still be answered.
    """

    name: str
    seconds: float
    shape: Callable[[Array], Array]
    hard: Callable[[float], float] = lambda moment: USUAL
    recorded: Array | None = None
    grace: float = 5.0

    def arrivals(self, peak: float, random: np.random.Generator) -> Array:
        """Moments of the requests, in order, for `peak` requests per second; by thinning (Lewis and Shedler, 1979)."""
        if self.recorded is not None:
            return self.recorded
        moments = np.sort(random.uniform(0, self.seconds, random.poisson(peak * self.seconds)))
        return moments[random.random(len(moments)) < self.shape(moments)]


def steady(seconds: float) -> Traffic:
    """The same rate all the time."""
    return Traffic("steady", seconds, lambda t: np.ones_like(t))


def day(seconds: float) -> Traffic:
    """From a fifth of the peak at night to the peak at noon and back."""
    return Traffic("a day", seconds, lambda t: 0.6 - 0.4 * np.cos(2 * np.pi * t / seconds))


def bursts(seconds: float) -> Traffic:
    """Two fifths of the peak, and twice for a sixth of the time the peak."""
    part = seconds / 12
    return Traffic("bursts", seconds, lambda t: np.where(np.isin(t // part, (3, 4, 8, 9)), 1.0, 0.4))


def harder(seconds: float) -> Traffic:
    """A day in which the share of hard texts goes from a quarter to three."""
    return Traffic("a harder day", seconds, day(seconds).shape, lambda t: USUAL + 0.5 * t / seconds)
