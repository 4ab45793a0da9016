"""Serving under load: the setting that a target needs now, and an alarm when the traffic is not what it was. Pure
computation; no server, clock or file is in it."""

from __future__ import annotations

from badge_peft.serving.controller import LatencyController
from badge_peft.serving.monitor import DriftAlarm, ExitMonitor

__all__ = ["DriftAlarm", "ExitMonitor", "LatencyController"]
