"""The quickstart: an adapter trained, saved, loaded, calibrated and timed, on real weights and real text."""

from __future__ import annotations

from badge_peft.demo.run import run_demo
from badge_peft.demo.settings import DemoSettings

__all__ = ["DemoSettings", "run_demo"]
