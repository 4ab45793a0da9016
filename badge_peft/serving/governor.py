"""`Governor`: the one place that knows the setting in force, for all replicas. Plain state; `deployment.py` makes it
an actor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from time import monotonic
from typing import Any
from uuid import uuid4

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.controller import LatencyController
from badge_peft.serving.monitor import DriftAlarm, ExitMonitor
from badge_peft.serving.report import Report, ServiceMetrics
from badge_peft.serving.requests import PolicyUpdate
from badge_peft.serving.settings import ONE_ADAPTER, check_goal

_GONE = 15.0  # seconds without a report after which a replica counts no more
_CALM, _LONGEST = 1.0, 60.0  # seconds: of calm before more care is tried, and the most that this is doubled to
REPORTS = 400  # that are taken in a second, from all replicas


class Governor:
    """Takes what replicas report, and says at which setting they answer. `check` raises a ValueError where a setting
    does not suit a task; `unwatched` has the reasons why tasks are not watched, whatever the setting; `interval` are
    the seconds between two decisions of the controller, and two reports of a replica; the rest is of
    `ServiceSettings`."""

    def __init__(
        self,
        configs: dict[str, EarlyExitConfig],
        problems: dict[str, str],
        check: Callable[[str, EarlyExitConfig], None],
        target: float | None = None,
        max_score_drop: float = 0.01,
        careful: bool = False,
        unwatched: Mapping[str, str] | None = None,
        interval: float = 1.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.version, self._life = 1, uuid4().hex
        self._known: float = 0  # the newest version of an earlier life that was heard of
        self._unwatched = dict(unwatched or {})
        self._own, self._chosen = dict(configs), dict(configs)
        self._check, self._clock, self.interval = check, clock, interval
        self._decided = self.heard = clock()
        self._latencies: list[float] = []
        self._late, self._waits = 0.0, False
        self._replicas: dict[str, Report] = {}
        self._seen: dict[str, float] = {}
        self._ending = False
        self.controller: LatencyController | None = None
        never = EarlyExitConfig(policy="never")
        self.monitors = {
            task: ExitMonitor.for_adapter(config, problems[task], careful=never if careful else None)
            for task, config in configs.items()
            if (config.calibration or {}).get("curve")
        }
        self._start(target, max_score_drop)
        self._metrics = ServiceMetrics()

    @property
    def configs(self) -> dict[str, EarlyExitConfig]:
        """The setting in force of each task: what was chosen, or the careful one after an alarm."""
        kept = self._chosen.items()
        return {task: self.monitors[task].setting(c) if task in self.monitors else c for task, c in kept}

    @property
    def unwatched(self) -> dict[str, str]:
        """For each task in whose traffic no drift would be noticed now, the reason."""
        found = dict(self._unwatched)
        for task, config in self.configs.items():
            if task not in self.monitors:
                found.setdefault(task, "nothing is stored that was measured: calibrate the adapter.")
            elif EarlyExitConfig.of(config, calibration=None) not in self.monitors[task].promises:
                found.setdefault(task, "nothing was measured of the setting in force: take a point of the curve.")
        return found

    def _start(self, target: float | None, max_score_drop: float) -> None:
        """A controller for `target`, or none."""
        check_goal(target, max_score_drop)
        made: LatencyController | None = None
        if target:
            if len(self._own) > 1:
                raise ValueError(ONE_ADAPTER)
            ((task, own),) = self._own.items()
            waits = {"wait": round(_CALM / self.interval) or 1, "longest_wait": round(_LONGEST / self.interval) or 1}
            made = LatencyController.for_adapter(own, target, max_score_drop, **waits)
            for point in made.points:
                self._check(task, point.config)
            self._chosen[task] = made.config
        self.controller, self.target, self.max_score_drop = made, target or None, max_score_drop

    def update(self, change: PolicyUpdate, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """Changes what was asked for, all of it or nothing, with a ValueError for what is not allowed. `known` is what
        the replica that passes it on was told last."""
        self._hear(known)
        unknown = sorted(set(change.tasks or {}) - set(self._own))
        if unknown:
            raise ValueError(f"there is no task {unknown[0]!r}: they are {', '.join(self._own)}.")
        configs, given = dict(self._chosen), bool(change.early_exit or any((change.tasks or {}).values()))
        for task, config in self._chosen.items():
            fields = {**(change.early_exit or {}), **(change.tasks or {}).get(task, {})}
            if fields:
                configs[task] = EarlyExitConfig.of(config, **fields)
                self._check(task, configs[task])
        drop = self.max_score_drop if change.max_score_drop is None else change.max_score_drop
        target = self.target if change.target is None else change.target or None
        moved = configs != self._chosen
        if moved and target:
            raise ValueError(f"target={target} moves the setting: switch it off with target=0 to set one yourself.")
        if (target, drop) != (self.target, self.max_score_drop):
            moves = self.target is not None
            self._start(target, drop)
            if target:
                configs = dict(self._chosen)
            elif moves and not given:  # what the controller has left is nobody's choice
                configs = dict(self._own)
        if change.reset_drift:
            for monitor in self.monitors.values():
                monitor.reset()
        self._chosen = configs
        self.version, self._known = self.version + 1, inf  # what other replicas knew before is older
        return self.state()

    def report(self, report: Report) -> dict[str, Any]:
        """Takes what a replica did, and says what to answer at from now on: `state`."""
        self._hear(report.state)
        now, before = self._clock(), self.configs
        self.heard = now
        for name in [name for name, seen in self._seen.items() if now - seen >= _GONE]:
            del self._replicas[name], self._seen[name]
            self._metrics.forget(name)
        self._replicas[report.replica], self._seen[report.replica] = report, now
        self._metrics.count(report)
        self._late = max(self._late, report.oldest, report.expected)
        self._waits |= report.waiting > 0
        if report.version == self.version:
            self._latencies += report.done.measured
        for task, rows in report.done.shadows:
            if task in self.monitors:
                monitor, config = self.monitors[task], EarlyExitConfig.of(rows["config"], calibration=None)
                if config in monitor.promises:
                    monitor.observe(config, rows["exit_layer"], rows["logits"], rows["full_logits"])
        self._decide(now)
        self.version += self.configs != before
        return self.state()

    def _hear(self, known: dict[str, Any] | None) -> None:
        """Goes on where a governor was that has died: a replica still knows. A controller starts at its most careful
        point, and monitors count anew, but an alarm stays. Of what several replicas know the newest counts, and what
        they know is never this life's version."""
        if known is None or known["life"] == self._life:
            return
        if known["version"] > self._known:
            self._known = known["version"]
            self._chosen = {task: EarlyExitConfig.of(fields) for task, fields in known["chosen"].items()}
            self._start(known["target"], known["max_score_drop"])
            for task, alarm in known["drift"].items():
                self.monitors[task].alarm = alarm and DriftAlarm(**alarm)
            self._ending = known["ending"]
            for name in known["replicas"]:  # they are to hear of all changes
                self._replicas.setdefault(name, Report(name))
                self._seen.setdefault(name, self._clock())
        self.version = max(self.version, known["version"] + 1)

    def _decide(self, now: float) -> None:
        """Once in each interval: the controller's next setting."""
        if now - self._decided < self.interval:
            return
        if self.controller is not None:
            measured = float(np.quantile(self._latencies, 0.95)) if self._latencies else None
            if self._late > self.controller.target:  # requests that wait now will miss it
                measured = max(measured or 0.0, self._late)
            if measured is not None or not self._waits:  # else nobody knows yet
                (task,) = self._chosen
                self._chosen[task] = self.controller.update(measured)
        self._decided, self._latencies, self._late, self._waits = now, [], 0.0, False

    def state(self) -> dict[str, Any]:
        """The setting in force and how it came about, for JSON."""
        return {
            "version": self.version,
            "life": self._life,
            "early_exit": _fields(self.configs),
            "chosen": _fields(self._chosen),  # the same, but for an alarm's careful one
            "target": self.target,
            "max_score_drop": self.max_score_drop,
            "replicas": {name: last.version for name, last in self._replicas.items()},
            "on_all_replicas": all(last.version == self.version for last in self._replicas.values()),
            "waiting": sum(last.waiting for last in self._replicas.values()),
            "ending": self._ending,
            "report_every": max(self.interval, len(self._replicas) / REPORTS),
            "drift": {task: m.alarm and dict(vars(m.alarm)) for task, m in self.monitors.items()},
            "unwatched": self.unwatched,
        }

    def end(self) -> dict[str, Any]:
        """Has the replicas refuse what comes from now on: they only finish what they have accepted."""
        self._ending = True
        self.version += 1
        return self.state()

    def metrics(self) -> str:
        """For Prometheus, as text."""
        speedup = None if self.controller is None else self.controller.point.blocks_saved
        return self._metrics.text(self.version, self.configs, self.monitors, self.unwatched, self.target, speedup)


def _fields(configs: dict[str, EarlyExitConfig]) -> dict[str, dict[str, Any]]:
    """For JSON, without what calibration has recorded."""
    return {task: EarlyExitConfig.of(config, calibration=None).to_dict() for task, config in configs.items()}
