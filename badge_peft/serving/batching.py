"""The rows of many requests in few passes. No server is in it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.base_engine import BaseEngine
from badge_peft.serving.requests import Row


@dataclass
class Work:
    """What one request asks: its texts, and the rest as `BaseEngine.predict` takes it. `seconds` are those of the pass
    that it shared with others, once it is answered."""

    rows: list[Row]
    tasks: tuple[str, ...] | None = None
    max_exit: int | None = None
    all_scores: bool = False
    seconds: float = 0.0


def answer_together(engine: BaseEngine, works: Sequence[Work], configs: Mapping[str, EarlyExitConfig]) -> list[Any]:
    """For each request the answers of its rows, or the exception that it ended with. Those that ask for the same share
    their passes; where these fail, each is answered alone, so that none has the failure of another."""
    groups: dict[Any, list[int]] = {}
    for i, work in enumerate(works):
        groups.setdefault((work.tasks, work.max_exit, work.all_scores), []).append(i)
    results: list[Any] = [None] * len(works)
    for asked, members in groups.items():
        try:
            answers = iter(engine.predict([row for i in members for row in works[i].rows], configs, *asked))
        except Exception as error:
            for i in members:
                results[i] = error if len(members) == 1 else answer_together(engine, [works[i]], configs)[0]
        else:
            for i in members:
                results[i] = list(islice(answers, len(works[i].rows)))
    return results


class Batcher:
    """Requests that wait while a pass runs go into the next one together: the busier the service, the larger the
    batches, and where nothing runs nobody waits. (`serve.batch` of Ray closes a batch by the clock, whether or not the
    model is free: a service that cannot keep up then works off a queue of small batches.)

    `run` answers requests together; a result that is an exception is raised where the request came from. A batch has
    `rows` rows (a request that has more is one by itself), and the first request of one that is not full waits `wait`
    seconds for others.
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
        while self._queue:  # until nobody waits
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
        while self._queue and not (batch and rows + len(self._queue[0][0].rows) > self.rows):
            work, future = self._queue.popleft()
            if not future.cancelled():
                batch.append((work, future))
                rows += len(work.rows)
        return batch
