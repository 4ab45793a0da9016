"""The service on Ray Serve: HTTP, batches and replicas around `Engine` and `Governor`."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import Any, get_type_hints

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from ray import serve

from badge_peft._version import package_version
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.batching import Work, answer_together
from badge_peft.serving.body import BodyLimit, set_body_limit
from badge_peft.serving.engine import MAIN, Engine
from badge_peft.serving.governor import Governor
from badge_peft.serving.requests import (
    PolicyUpdate,
    PredictRequest,
    RequestError,
    RerankRequest,
    Row,
    check_room,
    check_rows,
    check_tasks,
    check_token,
)
from badge_peft.serving.settings import ServiceSettings

logger = logging.getLogger(__name__)
_SHADOWS = 64  # rows that wait for a shadow run
_PATIENCE = 10.0  # seconds in which all replicas have to take a new setting


api = FastAPI(title="badge_peft", version=package_version(), description="Early exits for Hugging Face encoders.")
api.add_middleware(BodyLimit)


def _typed(method: Any) -> Any:
    """With types for the names of types in its annotations: Ray sends the class to its replicas without this module's
    names, and FastAPI could not find them there."""
    method.__annotations__ = get_type_hints(method)
    return method


@api.exception_handler(RequestError)
async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"detail": error.message}, error.status, headers)


@serve.deployment
@serve.ingress(api)
class Service:
    """One replica."""

    def __init__(self, settings: ServiceSettings, token: str | None) -> None:
        self.settings, self.token = settings, token
        set_body_limit(settings.limits.body_bytes)
        self.engine = Engine(settings.adapter, settings.base_model, settings.threads, settings.batch_size)
        self.name = f"{os.uname().nodename}-{os.getpid()}"
        self.governor = (
            ray.remote(Governor)
            .options(
                name=settings.governor,
                namespace="serve",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                lifetime="detached",
            )
            .remote(
                self.engine.configs,
                self.engine.problems,
                settings.target,
                settings.max_score_drop,
                settings.careful,
                settings.report_every,
            )
        )
        self.configs, self.version = dict(self.engine.configs), 0
        self.waiting = 0
        self._fresh()
        self._shadow_rows: list[tuple[str, Row]] = []
        self._draw = random.Random()
        self.answer.set_max_batch_size(settings.batch_size)
        self.answer.set_batch_wait_timeout_s(settings.batch_wait)
        self._task = asyncio.get_running_loop().create_task(self._report_for_ever())

    def _fresh(self) -> None:
        self._latencies: list[float] = []
        self._answered: Counter[tuple[str, int]] = Counter()
        self._statuses: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------------------ requests

    @api.post("/predict")
    @_typed
    async def predict(self, body: PredictRequest) -> Any:
        """Answers texts: a list of label, score and exit_layer; with tasks a mapping of such lists."""
        rows = body.rows()
        tasks = check_tasks(body.tasks, self.engine.tasks)
        found = await self._accepted(rows, lambda: self.answer(Work(rows, tasks, body.max_exit)))
        return found if tasks is None else {task: [row[task] for row in found] for task in tasks}

    @api.post("/rerank")
    @_typed
    async def rerank(self, body: RerankRequest) -> Any:
        """Ranks texts for a query: index and score, best first."""
        rows = body.rows()

        def call() -> Any:
            return asyncio.to_thread(self.engine.rerank, body.query, body.texts, body.top_k, self.configs[MAIN])

        found = await self._accepted(rows, call)
        return [{**item, "text": body.texts[item["index"]]} for item in found] if body.return_text else found

    async def _accepted(self, rows: list[Row], call: Callable[[], Any]) -> Any:
        """What `call` gives, once the rows are within the limits; counted in any case."""
        start, version = perf_counter(), self.version
        try:
            check_rows(rows, self.settings.limits)
            check_room(self.waiting, len(rows), self.settings.limits)
            self.waiting += len(rows)
            try:
                found = await call()
            finally:
                self.waiting -= len(rows)
        except RequestError as error:
            self._statuses[str(error.status)] += 1
            raise
        except Exception:
            self._statuses["500"] += 1
            raise
        self._statuses["200"] += 1
        if version == self.version:
            self._latencies.append(perf_counter() - start)
        return found

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def answer(self, works: list[Work]) -> list[Any]:
        """The answers of many requests: those that ask for the same in one pass."""
        share = self.settings.shadow_share
        draw = lambda: self._draw.random() < share  # noqa: E731
        batch = await asyncio.to_thread(answer_together, self.engine, works, dict(self.configs), draw)
        self._answered.update(batch.answered)
        self._shadow_rows = (self._shadow_rows + batch.sampled)[:_SHADOWS]
        return batch.results

    # ---------------------------------------------------------------------------------------------------- operations

    @api.get("/healthz")
    @_typed
    async def healthz(self) -> dict[str, str]:
        """Whether this replica is up."""
        return {"status": "ok"}

    @api.get("/info")
    @_typed
    async def info(self) -> dict[str, Any]:
        """What is served, at which setting, within which limits."""
        state = await self.governor.state.remote()
        adapter = {"tasks": self.engine.tasks, "ranks": self.engine.ranks, "exits": self.engine.badge.exit_layers()}
        return {"version": package_version(), **adapter, "limits": asdict(self.settings.limits), "policy": state}

    @api.get("/metrics", response_class=PlainTextResponse)
    @_typed
    async def metrics(self) -> str:
        """For Prometheus, of all replicas."""
        return await self.governor.metrics.remote()

    @api.put("/policy")
    @_typed
    async def policy(self, body: PolicyUpdate, request: Request) -> Any:
        """Changes policy, floor and target on all replicas; answers when they have taken it."""
        check_token(request.headers.get("authorization"), self.token)
        try:
            state = await self.governor.update.remote(body, self.engine.checks())
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise RequestError(400, str(error.cause)) from error
            raise
        end = perf_counter() + _PATIENCE
        while min(state["replicas"].values(), default=0) < state["version"] and perf_counter() < end:
            await self._report()
            await asyncio.sleep(self.settings.report_every / 10)
            state = await self.governor.state.remote()
        return state

    async def _report_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.report_every)
            try:
                await self._report()
            except Exception:
                logger.exception("a report has failed; the next one comes")

    async def _report(self) -> None:
        shadows = []
        if self.waiting == 0 and self._shadow_rows:  # there is time
            rows, self._shadow_rows = self._shadow_rows, []
            for task in sorted({task for task, _ in rows}):
                own = [row for of, row in rows if of == task]
                for paired in (False, True):
                    part = [row for row in own if (row[1] is not None) == paired]
                    if part:
                        run = asyncio.to_thread(self.engine.shadow, task, part, self.configs[task])
                        shadows.append((task, await run))
        answered = [(task, number, count) for (task, number), count in self._answered.items()]
        done = (self._latencies, answered, dict(self._statuses), self.waiting, shadows)
        self._fresh()
        state = await self.governor.report.remote(self.name, self.version, *done)
        self.version = state["version"]
        self.configs = {task: EarlyExitConfig.of(fields) for task, fields in state["early_exit"].items()}
