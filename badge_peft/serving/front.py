"""An ASGI middleware in front of the service's own code: it bounds what bodies take, each and all together, in bytes
and in seconds, before anything reads them whole, and tells how each request ended, whoever answered it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from starlette.responses import JSONResponse

from badge_peft.serving.requests import RequestError, check_token
from badge_peft.serving.settings import Limits

PATHS = ("/predict", "/rerank", "/policy", "/healthz", "/info", "/metrics")
_GONE = 499  # the client has gone before its answer; the number that nginx gives it


@dataclass
class _Process:
    """Of this process, whose one replica makes it known; the middleware is made with the application, before."""

    limits: Limits = field(default_factory=Limits)
    count: Callable[[str, int], None] = lambda path, status: None
    token: str | None = None
    requests: int = 0  # that are here now
    held: int = 0  # bytes of their bodies


_PROCESS = _Process()


def set_front(limits: Limits, count: Callable[[str, int], None], token: str | None = None) -> None:
    """Sets for this process the limits of bodies, what is given the path (one of `PATHS`, or `other`) and the status
    of each request that has ended, and who may change something (PUT)."""
    _PROCESS.limits, _PROCESS.count, _PROCESS.token = limits, count, token


class Front:
    """Answers 413 where a body is larger than allowed or said to be, 408 where it takes too long to come, 429 where
    all that are here take more than `Limits.all_bytes` and this one more than its share of that (a few large or slow
    ones do not shut out the small ones), and 401 or 403 where a change does not bear the token. Notes in
    `Server-Timing` of each answer the milliseconds until it was there, and how many of these the server took to hand
    over the body."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start, waited = _GONE, perf_counter(), 0.0

        async def timed() -> Any:
            nonlocal waited
            before = perf_counter()
            message = await receive()
            waited += perf_counter() - before
            return message

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = f"body;dur={1e3 * waited:.2f}, total;dur={1e3 * (perf_counter() - start):.2f}"
                message = {**message, "headers": [*message["headers"], (b"server-timing", took.encode())]}
            await send(message)

        try:
            await self._answer(scope, timed, noted)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            _PROCESS.count(path if path in PATHS else "other", status)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        body, limit = _Body(dict(scope["headers"]).get(b"content-length", b"0")), _PROCESS.limits.body_seconds
        _PROCESS.requests += 1
        try:
            try:
                if scope["method"] == "PUT":  # before anything of the body is read
                    check_token(dict(scope["headers"]).get(b"authorization"), _PROCESS.token)
                if not await asyncio.wait_for(body.read(receive), limit):
                    return
            except asyncio.TimeoutError:
                await _refuse(
                    send, RequestError(408, f"the body has not come within {limit:g} s: send less at a time.")
                )
                return
            except RequestError as error:
                await _refuse(send, error)
                return
            whole = [{"type": "http.request", "body": b"".join(body.parts), "more_body": False}]

            async def again() -> Any:
                return whole.pop() if whole else await receive()

            method = "GET" if scope["method"] == "HEAD" else scope["method"]  # the server leaves the body out
            await self.app({**scope, "method": method}, again, send)
        finally:
            _PROCESS.requests -= 1
            _PROCESS.held -= body.held


class _Body:
    """The body of a request, which counts as held from its header on where that says how long it is."""

    def __init__(self, said: bytes) -> None:
        self.parts: list[bytes] = []
        self.held, self._said = 0, said

    async def read(self, receive: Any) -> bool:
        """All of it into `parts`, within the limits; False where the client has gone before."""
        self._hold(int(self._said) if self._said.isdigit() else _PROCESS.limits.body_bytes + 1)
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return False
            self.parts.append(message.get("body", b""))
            size, more = size + len(self.parts[-1]), message.get("more_body", False)
            self._hold(max(0, size - self.held))
        return True

    def _hold(self, more: int) -> None:
        limits = _PROCESS.limits
        self.held += more
        _PROCESS.held += more
        if self.held > limits.body_bytes:
            raise RequestError(413, f"the body has more than {limits.body_bytes} bytes: send the texts in parts.")
        if _PROCESS.held > limits.all_bytes and self.held > limits.all_bytes / _PROCESS.requests:
            raise RequestError(429, "the service holds as much as it may: try again in a second.", retry_after=1)


def refusal(error: RequestError) -> JSONResponse:
    """As an answer."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"detail": error.message}, error.status, headers)


async def _refuse(send: Any, error: RequestError) -> None:
    """Answers, and has the server close the connection: what is left of the body is not read."""
    answer = refusal(error)
    answer.headers["Connection"] = "close"
    await answer({"type": "http"}, None, send)  # type: ignore[arg-type]  # it asks for nothing
