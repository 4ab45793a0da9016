"""What is simulated, and what comes of it: texts, how they are served, and latencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from badge_peft import EarlyExitConfig
from badge_peft.serving.governor import Governor
from capacity_parts.times import ServiceTimes

Array = np.ndarray


@dataclass(frozen=True)
class Rows:
    """The texts that requests are drawn from.

    Args:
        exits: [P, N], at each of P settings where each text stops.
        right: [P, N] bool, whether its answer is right.
        hard: [N] bool.
    """

    exits: Array
    right: Array
    hard: Array

    @cached_property
    def _kinds(self) -> tuple[Array, Array]:
        return np.flatnonzero(~self.hard), np.flatnonzero(self.hard)

    def draw(self, count: int, share: float, random: np.random.Generator) -> Array:
        """Numbers of `count` texts of which `share` are hard, in the mean."""
        easy, hard = self._kinds
        kind = random.random(count) < share
        return np.where(
            kind, hard[random.integers(len(hard), size=count)], easy[random.integers(len(easy), size=count)]
        )


@dataclass(frozen=True)
class Service:
    """How requests are served.

    Args:
        times: Of a replica.
        rows: Texts.
        setting: Number of the one in force, where there is no governor.
        governor: Makes the service's own governor, with a controller, from a clock; None: the setting stays.
        settings: All P of them; a controller's points are among them.
        batch_size: Texts in a batch; a request that has more is a batch by itself.
        batch_wait: Seconds that a request waits for others where no pass runs.
        request_rows: Texts of a request.
        waiting_rows: Beyond it a replica refuses requests.
        overhead: Seconds that a request takes outside of queue and batch: drawn from these.
    """

    times: ServiceTimes
    rows: Rows
    setting: int = 0
    governor: Callable[[Callable[[], float]], Governor] | None = None
    settings: Sequence[EarlyExitConfig] = ()
    batch_size: int = 32
    batch_wait: float = 0.0
    request_rows: int = 1
    waiting_rows: int = 2000
    overhead: Sequence[float] = (0.0,)

    @property
    def batch_requests(self) -> int:
        """How many requests a batch takes."""
        return max(1, self.batch_size // self.request_rows)


@dataclass
class Outcome:
    """What came of the requests.

    Args:
        moments: [R], when those that were answered came.
        latencies: [R], seconds.
        refused: How many were.
        unanswered: Still waiting at the end.
        right: Share of right answers.
        settings: The moment and the number of each change of the setting, as the governor makes it.
    """

    moments: Array
    latencies: Array
    refused: int
    unanswered: int
    right: float
    settings: list[tuple[float, int]] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Of the latency; requests that got no answer count as infinitely slow."""
        missing = np.full(self.refused + self.unanswered, np.inf)
        every = np.sort(np.concatenate([self.latencies, missing]))
        return float(every[min(int(share * len(every)), len(every) - 1)]) if len(every) else 0.0
