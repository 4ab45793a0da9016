"""What a replica tells the governor, from time to time, and what is counted of it for Prometheus."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import prometheus_client as prometheus

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.monitor import ExitMonitor

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)


@dataclass
class Done:
    """What a replica did since the last report that has arrived."""

    latencies: list[float] = field(default_factory=list)  # seconds that requests took
    measured: list[float] = field(default_factory=list)  # of those that the setting in force answered, first to last
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)  # rows by task and exit
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)  # requests by path and status
    shadows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # for tasks what `BaseEngine.shadow` gave

    def __add__(self, later: Done) -> Done:
        return Done(*(getattr(self, f.name) + getattr(later, f.name) for f in fields(self)))


@dataclass
class Report:
    """How one replica stands, and what it did since its last report."""

    replica: str
    version: int = 0  # of the setting that it answers at
    done: Done = field(default_factory=Done)
    waiting: int = 0  # rows that are accepted and not answered
    oldest: float = 0.0  # seconds that the oldest of them has waited; 0 where none waits
    expected: float = 0.0  # seconds that a new one will wait, by the last passes; 0 where nobody knows
    state: dict[str, Any] | None = None  # what the governor said last


class ServiceMetrics:
    """Of all replicas together."""

    def __init__(self) -> None:
        self._registry = prometheus.CollectorRegistry()

        def make(kind: Any, name: str, said: str, *labels: str, **more: Any) -> Any:
            return kind(f"badge_{name}", said, labels, registry=self._registry, **more)

        count, gauge = prometheus.Counter, prometheus.Gauge
        self._requests = make(count, "requests", "Requests by path and status.", "path", "status")
        said = "Seconds from a request to its answer, in the replica."
        self._latency = make(prometheus.Histogram, "latency_seconds", said, buckets=_SECONDS)
        self._rows = make(count, "rows", "Rows by task and the block that answered.", "task", "exit_layer")
        self._blocks = make(count, "blocks", "Blocks until a task's prediction.", "task")
        self._waiting = make(gauge, "waiting_rows", "Rows that are accepted and not answered.", "replica")
        self._setting = make(gauge, "setting", "Fields of the setting in force.", "task", "field")
        self._policy = make(gauge, "policy", "1 for the policy in force.", "task", "policy")
        self._version = make(gauge, "setting_version", "Number of the setting in force: it grows.")
        self._target = make(gauge, "target_seconds", "The controller's target; NaN without one.")
        self._speedup = make(gauge, "setting_speedup", "Of the controller's point: the share of blocks saved.")
        self._drift = make(gauge, "drift", "1 from an alarm of drift on.", "task")
        self._watched = make(gauge, "drift_watched", "0 where no drift would be noticed: /info says why.", "task")
        self._agreement = make(gauge, "agreement", "Shadow rows that agree with full depth.", "task")
        self._shadow_rows = make(gauge, "shadow_rows", "Shadow rows since the last reset.", "task")

    def count(self, report: Report) -> None:
        """Adds what a replica did."""
        for seconds in report.done.latencies:
            self._latency.observe(seconds)
        for (path, status), count in report.done.statuses.items():
            self._requests.labels(path, str(status)).inc(count)
        for (task, number), rows in report.done.answered.items():
            self._rows.labels(task, str(number)).inc(rows)
            self._blocks.labels(task).inc(number * rows)
        self._waiting.labels(report.replica).set(report.waiting)

    def forget(self, replica: str) -> None:
        """A replica has gone."""
        with suppress(KeyError):  # it has never reported to this governor
            self._waiting.remove(replica)

    def text(
        self,
        version: int,
        configs: Mapping[str, EarlyExitConfig],
        monitors: Mapping[str, ExitMonitor],
        unwatched: Mapping[str, str],
        target: float | None,
        speedup: float | None,
    ) -> str:
        """All of it, with the setting in force and the state of the monitors."""
        self._version.set(version)
        self._target.set(_number(target))
        self._speedup.set(_number(speedup))
        self._policy.clear()
        for task, config in configs.items():
            self._policy.labels(task, config.policy).set(1)
            self._watched.labels(task).set(task not in unwatched)
            for name in ("threshold", "patience", "depth", "max_exit"):
                value = getattr(config, name)
                self._setting.labels(task, name).set(_number(None if isinstance(value, list) else value))
        for task, monitor in monitors.items():
            self._drift.labels(task).set(monitor.alarm is not None)
            self._agreement.labels(task).set(_number(monitor.agreement))
            self._shadow_rows.labels(task).set(monitor.rows)
        return prometheus.generate_latest(self._registry).decode()


def _number(value: float | None) -> float:
    return math.nan if value is None else value
