"""`Governor`: the one place that knows the setting in force, for all replicas. Plain state; `deployment.py` makes it
an actor."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.controller import LatencyController
from badge_peft.serving.monitor import ExitMonitor
from badge_peft.serving.requests import PolicyUpdate

_GONE = 15.0  # seconds without a report after which a replica counts no more


class Governor:
    """Takes what replicas report, and says at which setting they answer.

    Args:
        configs: For each task the adapter's own setting.
        problems: For each task its problem type.
        target: Seconds that the p95 latency is kept below; None: the setting stays as it is.
        max_score_drop: The floor of the controller.
        careful: Whether to go to full depth after an alarm of drift.
        interval: Seconds between two decisions of the controller.
        clock: Seconds.
    """

    def __init__(
        self,
        configs: dict[str, EarlyExitConfig],
        problems: dict[str, str],
        target: float | None = None,
        max_score_drop: float = 0.01,
        careful: bool = False,
        interval: float = 1.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.version = 1
        self._own, self._chosen = dict(configs), dict(configs)
        self._clock, self.interval = clock, interval
        self._decided = clock()
        self._latencies: list[float] = []
        self._replicas: dict[str, tuple[float, int]] = {}
        self.controller: LatencyController | None = None
        never = EarlyExitConfig(policy="never")
        self.monitors = {
            task: ExitMonitor.for_adapter(config, problems[task], careful=never if careful else None)
            for task, config in configs.items()
            if (config.calibration or {}).get("curve")
        }
        self._start(target, max_score_drop)
        self._make_metrics()

    @property
    def configs(self) -> dict[str, EarlyExitConfig]:
        """The setting in force of each task: what was chosen, or the careful one after an alarm."""
        kept = self._chosen.items()
        return {task: self.monitors[task].setting(c) if task in self.monitors else c for task, c in kept}

    def _start(self, target: float | None, max_score_drop: float) -> None:
        """A controller for `target`, or none."""
        made: LatencyController | None = None
        if target:
            if len(self._own) > 1:
                raise ValueError("a target is for a service of one adapter: of many tasks, set each one's threshold.")
            (own,) = self._own.values()
            made = LatencyController.for_adapter(own, target, max_score_drop)
        self.controller, self.target, self.max_score_drop = made, target or None, max_score_drop

    # ------------------------------------------------------------------------------------------------------- changes

    def update(self, change: PolicyUpdate, check: Callable[[str, EarlyExitConfig], None]) -> dict[str, Any]:
        """Changes what was asked for, all of it or nothing.

        Args:
            change: The request.
            check: Raises a ValueError where a setting does not suit a task.

        Raises:
            ValueError: a name, a field or a value is not allowed, or a threshold is set while a target moves it.
        """
        unknown = sorted(set(change.tasks or {}) - set(self._own))
        if unknown:
            raise ValueError(f"there is no task {unknown[0]!r}: they are {', '.join(self._own)}.")
        configs = dict(self._chosen)
        for task, config in self._chosen.items():
            fields = {**(change.early_exit or {}), **(change.tasks or {}).get(task, {})}
            if fields:
                other = fields.get("policy", config.policy) != config.policy
                configs[task] = EarlyExitConfig.of(None if other else config, **fields)
                check(task, configs[task])
        drop = self.max_score_drop if change.max_score_drop is None else change.max_score_drop
        target = self.target if change.target is None else change.target or None
        moved = configs != self._chosen
        if moved and target:
            raise ValueError(f"target={target} moves the setting: switch it off with target=0 to set one yourself.")
        if (target, drop) != (self.target, self.max_score_drop):
            self._start(target, drop)
            if not target and not moved:
                configs = dict(self._own)
        if change.reset_drift:
            for monitor in self.monitors.values():
                monitor.reset()
        self._chosen = configs
        self.version += 1
        return self.state()

    def report(
        self,
        replica: str,
        version: int,
        latencies: list[float],
        answered: list[tuple[str, int, int]],
        statuses: dict[str, int],
        waiting: int,
        shadows: list[tuple[str, dict[str, Any]]],
    ) -> dict[str, Any]:
        """Takes what one replica did since its last report.

        Args:
            replica: Its name.
            version: The setting that it answered at.
            latencies: Seconds that requests took at that setting.
            answered: Of tasks and exits, how many rows: (task, exit, rows).
            statuses: How many requests ended with each status.
            waiting: Rows that it has not answered yet.
            shadows: For tasks what `Engine.shadow` gave.

        Returns:
            What to answer at from now on: `state`.
        """
        now, before = self._clock(), self.configs
        for name in [name for name, (seen, _) in self._replicas.items() if now - seen >= _GONE]:
            del self._replicas[name]
            self._waiting.remove(name)
        self._replicas[replica] = (now, version)
        self._count(replica, latencies, answered, statuses, waiting)
        if version == self.version:
            self._latencies += latencies
        for task, rows in shadows:
            if task in self.monitors:
                monitor, config = self.monitors[task], EarlyExitConfig.of(rows["config"], calibration=None)
                if config in monitor.promises:
                    monitor.observe(config, rows["exit_layer"], rows["logits"], rows["full_logits"])
        self._decide(now)
        self.version += self.configs != before
        return self.state()

    def _decide(self, now: float) -> None:
        """Once in each interval: the controller's next setting."""
        if now - self._decided < self.interval:
            return
        if self.controller is not None:
            (task,) = self._chosen
            measured = float(np.quantile(self._latencies, 0.95)) if self._latencies else None
            self._chosen[task] = self.controller.update(measured)
        self._decided, self._latencies = now, []

    def state(self) -> dict[str, Any]:
        """The setting in force and how it came about, for JSON."""
        return {
            "version": self.version,
            "early_exit": {
                task: EarlyExitConfig.of(c, calibration=None).to_dict() for task, c in self.configs.items()
            },
            "target": self.target,
            "max_score_drop": self.max_score_drop,
            "replicas": {name: version for name, (_, version) in self._replicas.items()},
            "drift": {task: m.alarm and dict(vars(m.alarm)) for task, m in self.monitors.items()},
        }

    # ------------------------------------------------------------------------------------------------------- metrics

    def _make_metrics(self) -> None:
        self._registry = CollectorRegistry()
        on = {"registry": self._registry}
        self._requests = Counter("badge_requests", "Requests by status.", ["status"], **on)
        self._latency = Histogram("badge_latency_seconds", "Seconds from a request to its answer.", **on)
        self._rows = Counter("badge_rows", "Rows by task and the block that answered.", ["task", "exit_layer"], **on)
        self._blocks = Counter("badge_blocks", "Blocks until the answers of a task.", ["task"], **on)
        self._waiting = Gauge("badge_waiting_rows", "Rows that are accepted and not answered.", ["replica"], **on)
        self._setting = Gauge(
            "badge_setting", "The setting in force: its number, and fields.", ["task", "field"], **on
        )
        self._drift = Gauge("badge_drift", "1 from an alarm of drift on.", ["task"], **on)
        self._agreement = Gauge("badge_agreement", "Shadow rows that agree with full depth.", ["task"], **on)
        self._shadow_rows = Gauge("badge_shadow_rows", "Shadow rows since the last reset.", ["task"], **on)

    def _count(
        self,
        replica: str,
        latencies: list[float],
        answered: list[tuple[str, int, int]],
        statuses: dict[str, int],
        waiting: int,
    ) -> None:
        for seconds in latencies:
            self._latency.observe(seconds)
        for status, count in statuses.items():
            self._requests.labels(status).inc(count)
        for task, number, rows in answered:
            self._rows.labels(task, str(number)).inc(rows)
            self._blocks.labels(task).inc(number * rows)
        self._waiting.labels(replica).set(waiting)

    def metrics(self) -> str:
        """For Prometheus, as text."""
        for task, config in self.configs.items():
            for name in ("threshold", "patience", "depth", "max_exit"):
                value = getattr(config, name)
                self._setting.labels(task, name).set(math.nan if value is None else value)
        for task, monitor in self.monitors.items():
            self._drift.labels(task).set(monitor.alarm is not None)
            self._agreement.labels(task).set(math.nan if monitor.agreement is None else monitor.agreement)
            self._shadow_rows.labels(task).set(monitor.rows)
        return generate_latest(self._registry).decode()
