"""An ASGI middleware that refuses bodies above a size, before anything reads them whole."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

_LIMIT = {"bytes": 4 * 2**20}  # of this process


def set_body_limit(size: int) -> None:
    """Allows so many bytes in a body, in this process."""
    _LIMIT["bytes"] = size


class BodyLimit:
    """Answers 413 where a request says that its body is larger, or where more comes than it said.

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
        limit, parts, size, more = _LIMIT["bytes"], [], 0, True
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
