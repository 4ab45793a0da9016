"""What the service counts, for Prometheus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.monitor import ExitMonitor
from badge_peft.serving.report import Report

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)


class ServiceMetrics:
    """Of all replicas together."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        on = {"registry": self._registry}
        self._requests = Counter("badge_requests", "Requests by path and status.", ["path", "status"], **on)
        self._latency = Histogram(
            "badge_latency_seconds", "Seconds from a request to its answer, in the replica.", buckets=_SECONDS, **on
        )
        self._rows = Counter("badge_rows", "Rows by task and the block that answered.", ["task", "exit_layer"], **on)
        self._blocks = Counter("badge_blocks", "Blocks until the answers of a task.", ["task"], **on)
        self._waiting = Gauge("badge_waiting_rows", "Rows that are accepted and not answered.", ["replica"], **on)
        self._setting = Gauge("badge_setting", "Fields of the setting in force.", ["task", "field"], **on)
        self._policy = Gauge("badge_policy", "1 for the policy in force.", ["task", "policy"], **on)
        self._version = Gauge("badge_setting_version", "Number of the setting in force: it grows.", **on)
        self._target = Gauge("badge_target_seconds", "The controller's target; NaN without one.", **on)
        self._speedup = Gauge("badge_setting_speedup", "Of the controller's point: the share of blocks saved.", **on)
        self._drift = Gauge("badge_drift", "1 from an alarm of drift on.", ["task"], **on)
        self._watched = Gauge(
            "badge_drift_watched", "0 where no drift would be noticed: /info says why.", ["task"], **on
        )
        self._agreement = Gauge("badge_agreement", "Shadow rows that agree with full depth.", ["task"], **on)
        self._shadow_rows = Gauge("badge_shadow_rows", "Shadow rows since the last reset.", ["task"], **on)

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
        return generate_latest(self._registry).decode()


def _number(value: float | None) -> float:
    return math.nan if value is None else value
