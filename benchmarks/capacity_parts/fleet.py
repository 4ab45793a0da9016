"""Discrete events: replicas that batch as the service's `Batcher` does and report to its own `Governor`, behind a
router that takes the shorter queue of two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from badge_peft.serving.governor import Governor
from badge_peft.serving.report import Done, Report
from capacity_parts.service import Outcome, Service
from capacity_parts.traffic import Traffic

_TICK = 0.001  # seconds: requests of a tick are routed together, each waits from its own moment on
_NEW = 0.3  # weight of the last batch in how fast rows are answered, as `Replica` has it


@dataclass
class _Replica:
    name: str
    slowness: float
    setting: int
    version: int = 0
    queue: list[tuple[float, int]] = field(default_factory=list)  # of requests that wait: moment, version then
    running: list[tuple[float, int]] = field(default_factory=list)
    asleep: Any = None  # an event
    speed: float | None = None  # rows in a second
    latencies: list[float] = field(default_factory=list)  # since the last report
    measured: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """That it has accepted and not answered."""
        return len(self.queue) + len(self.running)


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
        self.replicas = [_Replica(str(i), slow, service.setting) for i, slow in enumerate(replicas)]
        self.arrivals = traffic.arrivals(peak, self.random)
        self.numbers = {config: number for number, config in enumerate(service.settings)}
        self.moments: list[float] = []
        self.latencies: list[float] = []
        self.right = self.answered = self.refused = 0
        self.settings: list[tuple[float, int]] = []

    def run(self) -> Outcome:
        for replica in self.replicas:
            self.env.process(self._serve(replica))
        self.env.process(self._route())
        if self.service.governor is not None:
            governor = self.service.governor(lambda: self.env.now)
            for replica in self.replicas:
                self.env.process(self._report(replica, governor))
        self.env.run(until=self.traffic.seconds + self.traffic.grace)
        waiting = sum(replica.requests for replica in self.replicas)
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
                chosen = one if one.requests <= other.requests else other
                if chosen.requests >= limit:
                    self.refused += 1
                else:
                    chosen.queue.append((moments[done], chosen.version))
                    if chosen.asleep is not None:
                        chosen.asleep.succeed()
                        chosen.asleep = None
                done += 1

    def _serve(self, replica: _Replica) -> Iterator[Any]:
        service, random, size = self.service, self.random, self.service.batch_requests
        while True:
            if not replica.queue:
                replica.asleep = self.env.event()
                yield replica.asleep
            if service.batch_wait and len(replica.queue) < size:
                yield self.env.timeout(service.batch_wait)
            batch = replica.running = replica.queue[:size]
            replica.queue = replica.queue[size:]
            setting = replica.setting
            picks = service.rows.draw(len(batch) * service.request_rows, self.traffic.hard(self.env.now), random)
            seconds = replica.slowness * service.times.draw(service.rows.exits[setting][picks], random)
            yield self.env.timeout(seconds)
            replica.running = []
            found = [self.env.now - moment for moment, _ in batch]
            extra = service.overhead[int(random.integers(len(service.overhead)))]
            self.moments += [moment for moment, _ in batch]
            self.latencies += [value + extra for value in found]
            self.right += int(service.rows.right[setting][picks].sum())
            self.answered += len(picks)
            if service.governor is not None:
                speed = len(picks) / seconds
                replica.speed = speed if replica.speed is None else replica.speed + _NEW * (speed - replica.speed)
                replica.latencies += found
                pairs = zip(found, batch, strict=True)
                replica.measured += [value for value, (_, version) in pairs if version == replica.version]

    def _report(self, replica: _Replica, governor: Governor) -> Iterator[Any]:
        """From time to time, as often as the governor wants it, beginning with the start; so the setting arrives."""
        pause = 0.0
        while True:
            yield self.env.timeout(pause)
            now, rows = self.env.now, replica.requests * self.service.request_rows
            oldest = [moment for moment, _ in (*replica.running[:1], *replica.queue[:1])]
            state = governor.report(
                Report(
                    replica.name,
                    replica.version,
                    Done(replica.latencies, replica.measured),
                    waiting=rows,
                    oldest=now - oldest[0] if oldest else 0.0,
                    expected=rows / replica.speed if replica.speed else 0.0,
                )
            )
            replica.latencies, replica.measured = [], []
            if state["version"] != replica.version:
                (config,) = governor.configs.values()
                replica.version, replica.setting = state["version"], self.numbers[config]
                if not self.settings or self.settings[-1][1] != replica.setting:
                    self.settings.append((now, replica.setting))
            # the first reports are spread, or a large fleet would report all at once
            pause = state["report_every"] * (1.0 if pause else 1 - self.random.random())
