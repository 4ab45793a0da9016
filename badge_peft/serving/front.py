"""An ASGI middleware in front of the service's own code: it refuses bodies above a size before anything reads them
whole, and tells how each request ended, whoever answered it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

PATHS = ("/predict", "/rerank", "/policy", "/healthz", "/info", "/metrics")
_GONE = 499  # the client has gone before its answer; the number that nginx gives it


@dataclass
class _Process:
    """Of this process, whose one replica makes it known; the middleware is made with the application, before."""

    body_bytes: int = 4 * 2**20
    count: Callable[[str, int], None] = lambda path, status: None


_PROCESS = _Process()


def set_front(body_bytes: int, count: Callable[[str, int], None]) -> None:
    """Sets what the middleware of this process does.

    Args:
        body_bytes: So many are allowed in a body.
        count: Is given the path (one of `PATHS`, or `other`) and the status of each request that has ended.
    """
    _PROCESS.body_bytes, _PROCESS.count = body_bytes, count


class Front:
    """Answers 413 where a request says that its body is larger, or where more comes than it said, and notes in the
    header `Server-Timing` of each answer the milliseconds until it was there, and how many of these went by until the
    server had handed over the body.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
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
        limit, parts, size, more = _PROCESS.body_bytes, [], 0, True
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > limit:
            await _refuse(send, limit)
            return
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > limit:
                await _refuse(send, limit)
                return
        whole = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def again() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, again, send)


async def _refuse(send: Any, limit: int) -> None:
    body = json.dumps({"detail": f"the body has more than {limit} bytes: send the texts in parts."}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
