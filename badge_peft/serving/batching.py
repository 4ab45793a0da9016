"""The rows of many requests in few passes. No server is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.engine import MAIN, Engine
from badge_peft.serving.requests import Row


@dataclass
class Work:
    """What one request asks.

    Args:
        rows: Its texts.
        tasks: As for `Engine.predict`.
        max_exit: As for `Engine.predict`.
    """

    rows: list[Row]
    tasks: tuple[str, ...] | None = None
    max_exit: int | None = None


@dataclass
class Batch:
    """What came of a batch of requests.

    Args:
        results: For each request the answers of its rows, or the exception that it ended with.
        answered: How many rows each task and exit answered.
        sampled: Rows drawn for a shadow run, with their task.
    """

    results: list[Any]
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    sampled: list[tuple[str, Row]] = field(default_factory=list)


def answer_together(
    engine: Engine, works: Sequence[Work], configs: dict[str, EarlyExitConfig], draw: Callable[[], bool]
) -> Batch:
    """Answers requests; those that ask for the same tasks and bound share their passes, and their failure.

    Args:
        engine: Of the adapter.
        works: The requests.
        configs: As for `Engine.predict`.
        draw: Whether a row is taken for a shadow run. Rows with a bound of their own are not: nothing was measured of
            their setting.
    """
    groups: dict[Any, list[int]] = {}
    for i, work in enumerate(works):
        groups.setdefault((work.tasks, work.max_exit), []).append(i)
    batch = Batch([None] * len(works))
    for (tasks, max_exit), members in groups.items():
        rows = [row for i in members for row in works[i].rows]
        try:
            answers = engine.predict(rows, configs, tasks, max_exit)
        except Exception as error:
            for i in members:
                batch.results[i] = error
            continue
        for row, said in zip(rows, answers, strict=True):
            for task, own in (said if tasks else {MAIN: said}).items():
                batch.answered[task, own["exit_layer"]] += 1
                if max_exit is None and draw():
                    batch.sampled.append((task, row))
        for i in members:
            count = len(works[i].rows)
            batch.results[i], answers = answers[:count], answers[count:]
    return batch
