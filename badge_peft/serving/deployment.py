"""The service on Ray Serve: HTTP and processes around `Replica` and `Governor`."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable
from dataclasses import asdict
from time import monotonic, perf_counter, sleep
from typing import Any, get_type_hints

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from ray import serve
from starlette.exceptions import HTTPException

from badge_peft._version import package_version
from badge_peft.serving.batching import Work
from badge_peft.serving.front import Front, refusal, set_front
from badge_peft.serving.governor import Governor
from badge_peft.serving.replica import Replica, open_engine
from badge_peft.serving.report import Report
from badge_peft.serving.requests import (
    PolicyUpdate,
    PredictRequest,
    RequestError,
    RerankRequest,
    check_open,
    check_tasks,
    shape_message,
)
from badge_peft.serving.settings import TOKEN, ServiceSettings

_STARTING = (
    "the governor, which knows the setting, is being started again: try again in a second. What is in force by then "
    "is in /info."
)
_ALONE = 60.0
_PATIENCE = 10.0  # seconds in which all replicas have to take a new setting

api = FastAPI(title="badge_peft", version=package_version(), description="Early exits for Hugging Face encoders.")
api.add_middleware(Front)


async def _answer(call: Awaitable[Any]) -> Any:
    """What the governor says: 400 for what it refuses, 503 where it has died. (Above the class: Ray has a copy of that
    from the moment of its definition on.)"""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (TypeError, ValueError)):
            raise RequestError(400, str(error.cause)) from error
        raise
    except ray.exceptions.RayActorError as error:
        raise RequestError(503, _STARTING, retry_after=1) from error


def _typed(method: Any) -> Any:
    """With types for the names of types in its annotations: Ray sends the class to its replicas without this module's
    names, and FastAPI could not find them there."""
    method.__annotations__ = get_type_hints(method)
    return method


@api.exception_handler(RequestError)
async def _refused(_: Request, error: Any) -> JSONResponse:
    return refusal(error)


@api.exception_handler(RequestValidationError)
async def _misshapen(request: Request, error: Any) -> JSONResponse:
    return refusal(RequestError(422, shape_message(error.errors(), request.headers.get("content-type", ""))))


@api.exception_handler(HTTPException)
async def _unmet(request: Request, error: Any) -> JSONResponse:
    """FastAPI's own: a body that cannot be read, a path or a method that is not there."""
    message = f"there is no {request.method} {request.url.path} here: the page /docs has what there is."
    if error.status_code == 400:
        message = "the body cannot be read: it must be JSON in UTF-8, and not nested deeply."
    return JSONResponse({"detail": message}, error.status_code, error.headers)


class Governing(Governor):
    """A governor in a process of its own, which ends where no replica has reported for `_ALONE` seconds: whoever had
    the service may have gone without a word."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while monotonic() - self.heard < _ALONE:
            sleep(1.0)
        ray.kill(ray.get_runtime_context().current_actor)


@serve.deployment
@serve.ingress(api)
class Service:
    """One replica. Who has the `token` may change the policy; None: that in this process's environment, if one is."""

    def __init__(self, settings: ServiceSettings, token: str | None) -> None:
        self.settings = settings
        self.engine = open_engine(settings)
        self._meet_governor()
        name = f"{os.uname().nodename}-{os.getpid()}"
        self.replica = Replica(name, self.engine, settings, self._tell)
        set_front(settings.limits, self.replica.count, token or os.environ.get(TOKEN))
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self.replica.report_for_ever())]
        if settings.shadow_share:
            self._tasks.append(loop.create_task(self.replica.shadow_for_ever()))

    def _meet_governor(self) -> None:
        """Finds the governor of this service, or starts it."""
        settings, engine = self.settings, self.engine
        alive = {"num_cpus": 0, "max_restarts": -1, "lifetime": "detached"}
        made = ray.remote(Governing).options(name=settings.governor, namespace="serve", get_if_exists=True, **alive)
        self.governor = made.remote(
            engine.configs,
            engine.problems,
            engine.checks(),
            settings.target,
            settings.max_score_drop,
            settings.careful,
            engine.unwatched(settings.shadow_share),
            settings.report_every,
        )

    async def _tell(self, report: Report) -> dict[str, Any]:
        try:
            return await self.governor.report.remote(report)
        except ray.exceptions.ActorDiedError:  # for good: it heard of nobody for long
            self._meet_governor()
            raise

    async def reconfigure(self, _: Any) -> None:
        """Ray Serve calls this, and waits for it, before the first request: from then on the setting is known."""
        await self.replica.report()

    @api.post("/predict")
    @_typed
    async def predict(self, body: PredictRequest) -> Any:
        """Answers texts: a list of label, score, exit_layer (and scores); with tasks a mapping of such lists."""
        rows = body.rows()
        tasks = check_tasks(body.tasks, self.engine.tasks)
        work = Work(rows, tasks, body.max_exit, body.all_scores)
        found = await self.replica.predict(work)
        answers = found if tasks is None else {task: [row[task] for row in found] for task in tasks}
        return JSONResponse(answers, headers={"Server-Timing": f"model;dur={1e3 * work.seconds:.2f}"})

    @api.post("/rerank")
    @_typed
    async def rerank(self, body: RerankRequest) -> Any:
        """Ranks texts for a query: index and score, best first."""
        found = await self.replica.rerank(body)
        if body.return_text:
            found = [{**item, "text": body.texts[item["index"]]} for item in found]
        return JSONResponse(found)

    @api.get("/healthz")
    @_typed
    async def healthz(self) -> dict[str, str]:
        """Whether this replica is up, and takes requests."""
        check_open(self.replica.ending)
        return {"status": "ok"}

    @api.get("/info")
    @_typed
    async def info(self) -> dict[str, Any]:
        """What is served, at which setting, within which limits."""
        adapter = {name: getattr(self.engine, name) for name in ("tasks", "labels", "ranks", "exits")}
        back_end = "onnx" if self.settings.onnx else "torch"
        limits, state = asdict(self.settings.limits), await _answer(self.governor.state.remote())
        return {"version": package_version(), "back_end": back_end, **adapter, "limits": limits, "policy": state}

    @api.get("/metrics", response_class=PlainTextResponse)
    @_typed
    async def metrics(self) -> str:
        """For Prometheus, of all replicas."""
        return await _answer(self.governor.metrics.remote())

    @api.put("/policy")
    @_typed
    async def policy(self, body: PolicyUpdate) -> Any:
        """Changes policy, floor and target on all replicas; answers when they have taken it."""
        known = await _answer(self.replica.report())
        state = first = await _answer(self.governor.update.remote(body, known))
        end = perf_counter() + _PATIENCE
        while not state["on_all_replicas"] and perf_counter() < end:
            await _answer(self.replica.report())
            await asyncio.sleep(self.settings.report_every / 10)
            state = await _answer(self.governor.state.remote())
        if state["life"] != first["life"]:
            raise RequestError(503, _STARTING, retry_after=1)
        return state
