"""What is simulated: the ways to serve, the traffic, and how many replicas each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from badge_peft import EarlyExitConfig
from badge_peft.evaluation.curve import stored_curve
from badge_peft.serving.governor import Governor
from badge_peft.serving.settings import MAIN, ServiceSettings
from capacity_parts.fleet import simulate
from capacity_parts.measure import FULL
from capacity_parts.service import Outcome, Rows, Service
from capacity_parts.times import ServiceTimes
from capacity_parts.traffic import Traffic, bursts, day, harder

SIZES = (1, 10, 100, 1000)  # replicas that full depth takes at the peak, roughly
DROPS = (0.01, 0.03)
_LOAD = 0.7  # of what full depth can do in full batches


@dataclass(frozen=True)
class Plan:
    """All that a simulation needs of what was measured.

    Args:
        measured: From `measure`.
        target: Seconds that the 99th percentile is kept below.
        request_rows: Texts of a request.
        overhead: As for `Service`.
    """

    measured: dict[str, Any]
    target: float
    request_rows: int = 1
    overhead: tuple[float, ...] = (0.0,)

    def ways(self) -> dict[str, Service]:
        """By name: at full depth, at the adapter's own setting, and with controllers."""
        own = EarlyExitConfig.of(self.measured["early_exit"])
        curve = [point.config for point in stored_curve(own)]
        settings = (EarlyExitConfig(policy="never"), *curve)
        full, exits = self.fits()
        usual = {"request_rows": self.request_rows, "overhead": self.overhead, "settings": settings}
        served: dict[str, Service] = {FULL: Service(full, self.rows(), **usual)}
        fixed = Service(exits, self.rows(), settings.index(EarlyExitConfig.of(own, calibration=None)), **usual)
        served["fixed exits"] = fixed
        for drop in DROPS:
            make = governed(own, self.target / 2, drop)  # it keeps the 95th percentile, and needs room below the 99th
            served[f"a controller, {100 * drop:.0f} point{'s' * (drop > 0.01)} at most"] = replace(
                fixed, governor=make
            )
        return served

    def fits(self) -> tuple[ServiceTimes, ServiceTimes]:
        """Of full depth, and of all settings that exit."""
        batches = self.measured["batches"]
        of = ([b for b in batches if (b["setting"] == FULL) == full] for full in (True, False))
        return tuple(ServiceTimes.fit(own) for own in of)  # type: ignore[return-value]

    def rows(self) -> Rows:
        """The texts; full depth is setting 0."""
        found = self.measured["rows"]
        depth = [self.measured["depth"]] * len(found["hard"])
        right = np.array([found["full_right"], *found["right"]])
        return Rows(np.array([depth, *found["exits"]]), right, np.array(found["hard"]))

    def capacity(self) -> float:
        """Requests per second that one replica answers at full depth in full batches."""
        service = self.ways()[FULL]
        rows = np.full(service.batch_requests * self.request_rows, self.measured["depth"])
        return service.batch_requests / service.times.mean(rows)


def governed(own: EarlyExitConfig, target: float, drop: float) -> Callable[[Callable[[], float]], Governor]:
    """Makes the governor of a service with `--target-p95`, as the service sets it."""
    interval = ServiceSettings("").report_every

    def make(clock: Callable[[], float]) -> Governor:
        problems = {MAIN: "single_label_classification"}  # for the monitor, which hears of nothing here
        return Governor({MAIN: own}, problems, lambda *_: None, target, drop, interval=interval, clock=clock)

    return make


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        traffic: Of which shape.
        size: Of `SIZES`.
        slow: How many times longer one replica in ten takes, and one at least.
    """

    traffic: Traffic
    size: int
    slow: float = 1.0

    @property
    def name(self) -> str:
        """On the page."""
        return (
            self.traffic.name
            if self.slow == 1
            else f"{self.traffic.name}, one machine in ten (at least one) {self.slow:g}x slower"
        )

    def fleet(self, count: int) -> list[float]:
        """The slowness of so many replicas."""
        return [self.slow if number % 10 == 0 else 1.0 for number in range(count)]


def cases(seconds: float, sizes: tuple[int, ...] = SIZES) -> Iterator[Case]:
    """All of them; what takes long is left out for the largest fleets, and shorter there."""
    for size in sizes:
        length = seconds if size < 1000 else seconds / 3
        yield Case(day(length), size)
        yield Case(bursts(length), size)
        if 1 < size < 1000:
            yield Case(day(length), size, slow=2.0)
            yield Case(harder(length), size)


def replicas_needed(
    service: Service, case: Case, peak: float, target: float, guess: int, seed: int = 0
) -> tuple[int, Outcome]:
    """The least number of replicas, to 2%, with which the 99th percentile is at most `target`, and what came of it.

    Args:
        service: How.
        case: Which traffic and machines.
        peak: Requests per second.
        target: Seconds.
        guess: Where the search starts.
        seed: Of the draws.

    Raises:
        ValueError: no number of replicas keeps the target.
    """

    def tried(count: int) -> Outcome:
        return simulate(service, case.fleet(count), case.traffic, peak, seed)

    low, high, step = 0, max(guess, 1), 1.06
    best = tried(high)
    while best.quantile(0.99) > target:  # one after another upwards, faster and faster
        low, high = high, max(high + 1, round(high * step))
        step *= 1.25
        if high > 20 * max(guess, 1) + 20:
            raise ValueError(f"the target of {target} s is not kept with {low} replicas: set a longer one.")
        best = tried(high)
    step = 1.06
    while high - low > max(1, high // 50):
        middle = (low + high) // 2 if low else max(1, min(high - 1, round(high / step)))
        found = tried(middle)
        if found.quantile(0.99) > target:
            low = middle
        else:
            high, best, step = middle, found, step * 1.25
    return high, best
