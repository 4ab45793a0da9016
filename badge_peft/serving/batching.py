"""The rows of many requests in few passes. No server is in it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
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
        all_scores: As for `Engine.predict`.
        seconds: Once it is answered: what the pass took that it shared with others.
    """

    rows: list[Row]
    tasks: tuple[str, ...] | None = None
    max_exit: int | None = None
    all_scores: bool = False
    seconds: float = 0.0


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
    """Answers requests; those that ask for the same tasks and bound share their passes. Where these fail, each is
    answered alone, so that none has the failure of another.

    Args:
        engine: Of the adapter.
        works: The requests.
        configs: As for `Engine.predict`.
        draw: Whether a row is taken for a shadow run. Rows with a bound of their own are not: nothing was measured of
            their setting.
    """
    groups: dict[Any, list[int]] = {}
    for i, work in enumerate(works):
        groups.setdefault((work.tasks, work.max_exit, work.all_scores), []).append(i)
    batch = Batch([None] * len(works))
    for (tasks, max_exit, all_scores), members in groups.items():
        rows = [row for i in members for row in works[i].rows]
        try:
            answers = engine.predict(rows, configs, tasks, max_exit, all_scores)
        except Exception as error:
            alone = [answer_together(engine, [works[i]], configs, draw) for i in members] if len(members) > 1 else []
            for i, own in zip(members, alone or [Batch([error])], strict=True):
                batch.results[i] = own.results[0]
                batch.answered += own.answered
                batch.sampled += own.sampled
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


class Batcher:
    """Requests that wait while a pass runs go into the next one together: the busier the service, the larger the
    batches, and where nothing runs nobody waits. (`serve.batch` of Ray closes a batch by the clock, whether or not the
    model is free: a service that cannot keep up then works off a queue of small batches.)

    Args:
        run: Answers requests together; a result that is an exception is raised where the request came from.
        rows: Rows of a batch; a request that has more is a batch by itself.
        wait: Seconds that the first request of a batch that is not full waits for others.
    """

    def __init__(self, run: Callable[[list[Work]], Awaitable[list[Any]]], rows: int, wait: float = 0.0) -> None:
        self._run, self.rows, self.wait = run, rows, wait
        self._queue: deque[tuple[Work, asyncio.Future[Any]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, work: Work) -> Any:
        """The result of one request."""
        future = asyncio.get_running_loop().create_future()
        self._queue.append((work, future))
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._work())
        result = await future
        if isinstance(result, Exception):
            raise result
        return result

    async def _work(self) -> None:
        """Until nobody waits."""
        while self._queue:
            if self.wait and sum(len(work.rows) for work, _ in self._queue) < self.rows:
                await asyncio.sleep(self.wait)
            batch = self._take()
            try:
                results = await self._run([work for work, _ in batch]) if batch else []
            except Exception as error:
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _take(self) -> list[tuple[Work, asyncio.Future[Any]]]:
        """The first requests that make a batch; those whose clients have gone are dropped."""
        batch: list[tuple[Work, asyncio.Future[Any]]] = []
        rows = 0
        while self._queue:
            work, future = self._queue[0]
            if batch and rows + len(work.rows) > self.rows:
                break
            self._queue.popleft()
            if not future.cancelled():
                batch.append((work, future))
                rows += len(work.rows)
        return batch
