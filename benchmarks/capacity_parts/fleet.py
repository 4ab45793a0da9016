"""Discrete events: replicas that batch as `@serve.batch` does, behind a router that takes the shorter queue of two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import simpy

from badge_peft import EarlyExitConfig
from badge_peft.serving import LatencyController
from capacity_parts.times import ServiceTimes
from capacity_parts.traffic import Traffic

Array = np.ndarray
_TICK = 0.001  # seconds: requests of a tick are routed together, each waits from its own moment on


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
        setting: Number of the one in force, where there is no controller.
        controller: Makes the controller; None: the setting stays.
        settings: All P of them; a controller's points are among them.
        interval: Seconds between its decisions.
        batch_size: Requests in a batch.
        batch_wait: Seconds that a request waits for others.
        request_rows: Texts of a request.
        waiting_rows: Beyond it a replica refuses requests.
        overhead: Seconds that a request takes outside of queue and batch: drawn from these.
    """

    times: ServiceTimes
    rows: Rows
    setting: int = 0
    controller: Callable[[], LatencyController] | None = None
    settings: Sequence[EarlyExitConfig] = ()
    interval: float = 1.0
    batch_size: int = 32
    batch_wait: float = 0.002
    request_rows: int = 1
    waiting_rows: int = 2000
    overhead: Sequence[float] = (0.0,)


@dataclass
class Outcome:
    """What came of the requests.

    Args:
        moments: [R], when those that were answered came.
        latencies: [R], seconds.
        refused: How many were.
        unanswered: Still waiting at the end.
        right: Share of right answers.
        settings: At each decision of the controller the moment and its setting.
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


@dataclass
class _Replica:
    slowness: float
    queue: list[float] = field(default_factory=list)  # moments of the requests that wait
    running: int = 0
    asleep: Any = None  # an event


def simulate(service: Service, replicas: Sequence[float], traffic: Traffic, peak: float, seed: int = 0) -> Outcome:
    """Serves traffic.

    Args:
        service: How.
        replicas: Of each how many times longer than measured it takes.
        traffic: Of which shape.
        peak: Requests per second at its peak.
        seed: Of all draws.
    """
    return _Fleet(service, replicas, traffic, peak, seed).run()


class _Fleet:
    def __init__(self, service: Service, replicas: Sequence[float], traffic: Traffic, peak: float, seed: int) -> None:
        self.service, self.traffic = service, traffic
        self.random = np.random.default_rng(seed)
        self.env = simpy.Environment()
        self.replicas = [_Replica(slowness) for slowness in replicas]
        self.arrivals = traffic.arrivals(peak, self.random)
        self.setting, self.changed = service.setting, 0.0
        self.recent: list[float] = []
        self.moments: list[float] = []
        self.latencies: list[float] = []
        self.right = self.answered = self.refused = 0
        self.settings: list[tuple[float, int]] = []

    def run(self) -> Outcome:
        for replica in self.replicas:
            self.env.process(self._serve(replica))
        self.env.process(self._route())
        if self.service.controller is not None:
            self.env.process(self._control(self.service.controller()))
        self.env.run(until=self.traffic.seconds + self.traffic.grace)
        waiting = sum(len(replica.queue) + replica.running for replica in self.replicas)
        share = self.right / max(self.answered, 1)
        return Outcome(np.array(self.moments), np.array(self.latencies), self.refused, waiting, share, self.settings)

    def _route(self) -> Iterator[Any]:
        """The shorter queue of two replicas that are drawn (Mitzenmacher, 2001), as Ray Serve has it."""
        limit = self.service.waiting_rows // self.service.request_rows
        count = len(self.replicas)
        first, second = (self.random.integers(count, size=len(self.arrivals)).tolist() for _ in range(2))
        moments, done = self.arrivals.tolist(), 0
        while done < len(moments):
            yield self.env.timeout(max(moments[done] - self.env.now, _TICK))
            while done < len(moments) and moments[done] <= self.env.now:
                one, other = self.replicas[first[done]], self.replicas[second[done]]
                chosen = one if len(one.queue) + one.running <= len(other.queue) + other.running else other
                if len(chosen.queue) >= limit:
                    self.refused += 1
                else:
                    chosen.queue.append(moments[done])
                    if chosen.asleep is not None:
                        chosen.asleep.succeed()
                        chosen.asleep = None
                done += 1

    def _serve(self, replica: _Replica) -> Iterator[Any]:
        service, random = self.service, self.random
        while True:
            if not replica.queue:
                replica.asleep = self.env.event()
                yield replica.asleep
            if len(replica.queue) < service.batch_size and service.batch_wait:
                yield self.env.timeout(service.batch_wait)
            batch, replica.queue = replica.queue[: service.batch_size], replica.queue[service.batch_size :]
            replica.running = len(batch)
            setting = self.setting
            picks = service.rows.draw(len(batch) * service.request_rows, self.traffic.hard(self.env.now), random)
            seconds = service.times.draw(service.rows.exits[setting][picks], random)
            yield self.env.timeout(seconds * replica.slowness)
            replica.running = 0
            now = self.env.now
            extra = service.overhead[int(random.integers(len(service.overhead)))]
            found = [now - moment + extra for moment in batch]
            self.moments += batch
            self.latencies += found
            self.right += int(service.rows.right[setting][picks].sum())
            self.answered += len(picks)
            if service.controller is not None:  # only what was asked and answered at the setting in force counts
                self.recent += [value for value, moment in zip(found, batch, strict=True) if moment >= self.changed]

    def _control(self, controller: LatencyController) -> Iterator[Any]:
        numbers = {config: number for number, config in enumerate(self.service.settings)}
        self.setting = numbers[controller.config]
        while True:
            yield self.env.timeout(self.service.interval)
            measured = float(np.quantile(self.recent, 0.95)) if self.recent else None
            self.recent.clear()
            chosen = numbers[controller.update(measured)]
            if chosen != self.setting:
                self.setting, self.changed = chosen, self.env.now
            self.settings.append((self.env.now, chosen))
