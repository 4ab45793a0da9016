"""`Replica`: the rows that one replica has accepted, the setting that it answers at, and what it tells of both. No
server is in it: `deployment.py` puts HTTP and processes around it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.base_engine import BaseEngine, passes
from badge_peft.serving.batching import Batcher, Work, answer_together
from badge_peft.serving.report import Done, Report
from badge_peft.serving.requests import RerankRequest, Row, check_open, check_room, check_rows
from badge_peft.serving.settings import MAIN, ServiceSettings

logger = logging.getLogger(__name__)
_NEW = 0.3  # weight of the last pass in how fast rows are answered
_SHADOWS = 8  # rows of a shadow run, which other requests wait for
_SHADOW_TIME = 0.05  # the share of the time that shadow runs may take
_JOINING = 60.0  # seconds within which a new replica has to hear of the setting


def open_engine(settings: ServiceSettings) -> BaseEngine:
    """What answers."""
    if settings.onnx:
        from badge_peft.serving.onnx_engine import OnnxEngine

        return OnnxEngine(settings.adapter, settings.threads, settings.batch_size)
    from badge_peft.serving.engine import Engine

    return Engine(settings.adapter, settings.base_model, settings.threads, settings.batch_size)


class Replica:
    """Answers at the setting that the governor says, once it has heard of it. `tell` hands a report to the governor,
    and returns its `state`."""

    def __init__(
        self,
        name: str,
        engine: BaseEngine,
        settings: ServiceSettings,
        tell: Callable[[Report], Awaitable[dict[str, Any]]],
    ) -> None:
        self.name, self.engine, self.settings, self._tell = name, engine, settings, tell
        self.configs, self.version, self.ending = dict(engine.configs), 0, False
        self._state: dict[str, Any] | None = None
        self._waiting: dict[object, float] = {}  # for each request that is accepted and not answered, since when
        self._waiting_rows = 0
        self._speed: float | None = None  # rows that a second of passes answers
        self._batcher = Batcher(self._answer, settings.batch_size, settings.batch_wait)
        self._model = ThreadPoolExecutor(1)  # one pass at a time, of as many threads as the settings say
        self._done = Done()
        self._shadow_rows: list[tuple[str, Row]] = []  # of those that were drawn since the last run
        self._drawn, self._unwatched = 0, engine.unwatched(settings.shadow_share)
        self._draw = random.Random()
        self._reporting = asyncio.Lock()
        self._joined = asyncio.Event()

    def count(self, path: str, status: int) -> None:
        """A request has ended: see `set_front`."""
        self._done.statuses[path, status] += 1

    async def predict(self, work: Work) -> Any:
        """The answers to the rows of a request, which share their passes with other requests."""
        return await self._accept(work.rows, lambda: self._batcher(work), measured=work.max_exit is None)

    async def rerank(self, body: RerankRequest) -> list[dict[str, Any]]:
        """The candidates of a query, best first: a pass of their own."""

        async def call() -> list[dict[str, Any]]:
            config = next(iter(self.configs.values()))
            (found, exits), seconds = await self._run(self.engine.rerank, body.query, body.texts, body.top_k, config)
            self._note_speed(len(exits), seconds)
            self._done.answered.update((MAIN, number) for number in exits)
            return found

        return await self._accept(body.rows(), call)

    async def _accept(self, rows: list[Row], call: Callable[[], Awaitable[Any]], measured: bool = True) -> Any:
        """What `call` gives, once the rows are within the limits; `measured` where it is at the setting in force."""
        start, version, ticket = perf_counter(), self.version, object()
        check_open(self.ending)
        check_rows(rows, self.settings.limits)
        check_room(self._waiting_rows, len(rows), self.settings.limits)
        self._waiting[ticket] = start
        self._waiting_rows += len(rows)
        try:
            await asyncio.wait_for(self._joined.wait(), _JOINING)
            found = await call()
        finally:
            del self._waiting[ticket]
            self._waiting_rows -= len(rows)
        seconds = perf_counter() - start
        self._done.latencies.append(seconds)
        if measured and version == self.version:
            self._done.measured.append(seconds)
        return found

    async def _answer(self, works: list[Work]) -> list[Any]:
        results, seconds = await self._run(answer_together, self.engine, works, dict(self.configs))
        self._note_speed(sum(len(work.rows) for work in works), seconds)
        for work, result in zip(works, results, strict=True):
            work.seconds = seconds
            for row, said in zip(work.rows, () if isinstance(result, Exception) else result, strict=False):
                for task, own in (said if work.tasks else {MAIN: said}).items():
                    self._done.answered[task, own["exit_layer"]] += 1
                    if work.max_exit is None:  # of a bound of its own nothing was measured
                        self._maybe_shadow(task, row)
        return results

    def _maybe_shadow(self, task: str, row: Row) -> None:
        """Draws rows that run at full depth as well. Each since the last shadow run is as likely as any other to be in
        the next (a reservoir)."""
        if task in self._unwatched or self._draw.random() >= self.settings.shadow_share:
            return
        self._drawn += 1
        place = len(self._shadow_rows) if self._drawn <= _SHADOWS else self._draw.randrange(self._drawn)
        self._shadow_rows[place : place + 1] = [(task, row)] if place < _SHADOWS else []

    async def _run(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        """What `call` gives in the thread of the model, and the seconds that it takes there."""

        def timed() -> tuple[Any, float]:
            start = perf_counter()
            return call(*arguments), perf_counter() - start

        return await asyncio.get_running_loop().run_in_executor(self._model, timed)

    def _note_speed(self, rows: int, seconds: float) -> None:
        speed = rows / max(seconds, 1e-6)
        self._speed = speed if self._speed is None else self._speed + _NEW * (speed - self._speed)

    async def report(self) -> dict[str, Any]:
        """Tells the governor what was done, and takes the setting."""
        async with self._reporting:  # one after the other, or an older setting might come last
            done, self._done = self._done, Done()
            now, waiting = perf_counter(), self._waiting_rows
            oldest = now - next(iter(self._waiting.values()), now)  # they are in the order in which they came
            expected = waiting / self._speed if self._speed else 0.0
            try:
                report = Report(self.name, self.version, done, waiting, oldest, expected, self._state)
                self._state = state = await self._tell(report)
            except Exception:
                self._done = done + self._done
                raise
            if state["version"] != self.version:
                self.configs = {task: EarlyExitConfig.of(fields) for task, fields in state["early_exit"].items()}
                self.version, self.ending = state["version"], state["ending"]
            self._joined.set()
            return state

    async def report_for_ever(self) -> None:
        """As often as the governor wants it."""
        pause = 0.0
        while True:
            await asyncio.sleep(pause)
            pause = self.settings.report_every
            try:
                pause = (await self.report())["report_every"]
            except Exception:
                logger.exception("a report has failed; the next one comes")

    async def shadow_for_ever(self) -> None:
        """As often as shadow runs may take time, whether or not others wait: busy hours have texts of their own."""
        pause = 0.0
        while True:
            await asyncio.sleep(max(pause, self.settings.report_every))
            try:
                pause = await self.run_shadows() / _SHADOW_TIME
            except Exception:
                logger.exception("a shadow run has failed; the next one comes")

    async def run_shadows(self) -> float:
        """Answers the rows that were drawn early and at full depth; returns the seconds that it took."""
        rows, self._shadow_rows, self._drawn, took = self._shadow_rows, [], 0, 0.0
        for task in sorted({task for task, _ in rows}):
            own = [row for of, row in rows if of == task]
            for places in passes(own, self.settings.batch_size):
                part = [own[i] for i in places]
                said, seconds = await self._run(self.engine.shadow, task, part, self.configs[task])
                self._done.shadows.append((task, said))
                took += seconds
        return took
