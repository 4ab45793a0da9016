"""Open-loop traffic: when requests are sent does not depend on when they are answered."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Traffic:
    """A shape of traffic: how long it goes on, texts per second at a second, as a share of what the stock model can
    answer, the largest rate, and whether a second is of the part that the tables show by itself."""

    seconds: float
    rate: Callable[[float], float]
    peak: float
    busy: Callable[[float], bool] = bool


def shapes(scale: float) -> dict[str, Traffic]:
    """By name, with all durations times `scale`."""
    quiet, burst = 10 * scale, 15 * scale
    period, day = quiet + burst, 60 * scale

    def in_burst(second: float) -> bool:
        return second % period >= quiet and second < 2 * period

    return {
        "bursts": Traffic(
            2 * period + quiet,
            lambda second: 2.0 if in_burst(second) else 0.5,
            2.0,
            in_burst,
        ),
        "day": Traffic(day, lambda second: 0.2 + 1.4 * math.sin(math.pi * second / day) ** 2, 1.6),
    }


def arrivals(traffic: Traffic, capacity: float, size: int, seed: int) -> list[float]:
    """The seconds at which requests of `size` texts are sent: a Poisson process whose rate follows the traffic, by
    thinning (Lewis and Shedler, 1979). The shares are of `capacity` texts per second."""
    draw = np.random.default_rng(seed)
    most = traffic.peak * capacity / size
    found = []
    now = 0.0
    while True:
        now += draw.exponential(1 / most)
        if now >= traffic.seconds:
            return found
        if draw.random() * traffic.peak < traffic.rate(now):
            found.append(now)
