"""What a replica tells the governor, from time to time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Done:
    """What a replica did since the last report that has arrived.

    Args:
        latencies: Seconds that requests took.
        measured: Those of requests that were answered at one setting, the one in force, from first to last.
        answered: Rows by task and exit.
        statuses: Requests by path and status.
        shadows: For tasks what `BaseEngine.shadow` gave.
    """

    latencies: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    shadows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __add__(self, later: Done) -> Done:
        return Done(*(getattr(self, f.name) + getattr(later, f.name) for f in fields(self)))


@dataclass
class Report:
    """How one replica stands, and what it did since its last report.

    Args:
        replica: Its name.
        version: Of the setting that it answers at.
        done: What it did.
        waiting: Rows that are accepted and not answered.
        oldest: Seconds that the oldest of them has waited; 0 where none waits.
        expected: Seconds that a new one will wait, as fast as rows were answered of late; 0 where nobody knows.
        state: What the governor said last.
    """

    replica: str
    version: int = 0
    done: Done = field(default_factory=Done)
    waiting: int = 0
    oldest: float = 0.0
    expected: float = 0.0
    state: dict[str, Any] | None = None
