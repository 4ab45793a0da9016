"""A light client: httpx and asyncio, bodies made before and answers read after the clock has run."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx

FAILED = 0  # the status of a request that ended without one


@dataclass
class Sent:
    """A request and what came of it: the second at which it was to be sent, by how much later the client sent it, the
    seconds from `at` until the answer was there, HTTP's status or `FAILED`, the places of its texts, and the
    answer."""

    at: float
    lag: float
    seconds: float
    status: int
    rows: list[int]
    content: bytes

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Of each text; empty where there is none."""
        return json.loads(self.content) if self.status == 200 else []


def bodies(texts: Sequence[str], size: int) -> list[tuple[list[int], bytes]]:
    """Requests of `size` texts that together ask for all of them, in turn."""
    parts = [list(range(start, start + size)) for start in range(0, len(texts) - size + 1, size)]
    return [(rows, json.dumps({"inputs": [texts[i] for i in rows]}).encode()) for rows in parts]


async def _post(client: httpx.AsyncClient, start: float, at: float, rows: list[int], body: bytes) -> Sent:
    lag = perf_counter() - start - at
    try:
        answer = await client.post("/predict", content=body, headers={"Content-Type": "application/json"})
        status = answer.status_code
        content = answer.content
    except httpx.HTTPError as error:
        status = FAILED
        content = repr(error).encode()
    return Sent(at, lag, perf_counter() - start - at, status, rows, content)


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=4000, max_keepalive_connections=500)
    return httpx.AsyncClient(base_url=url, timeout=60, limits=limits)


def play(url: str, requests: Sequence[tuple[list[int], bytes]], times: Sequence[float]) -> list[Sent]:
    """Sends a request at each of the `times`, whatever has come of those before, and waits for all."""

    async def run() -> list[Sent]:
        async with _client(url) as client:
            await client.get("/healthz")
            tasks, start = [], perf_counter()
            for i, at in enumerate(times):
                await asyncio.sleep(max(at - (perf_counter() - start), 0))
                tasks.append(
                    asyncio.ensure_future(
                        _post(
                            client,
                            start,
                            at,
                            *requests[i % len(requests)],
                        )
                    )
                )
            return list(await asyncio.gather(*tasks))

    return _without_collector(run())


def saturate(
    url: str, requests: Sequence[tuple[list[int], bytes]], connections: int, seconds: float | None = None
) -> list[Sent]:
    """Sends the next request as soon as one of `connections` is free: for some seconds, or each request once."""

    async def run() -> list[Sent]:
        found: list[Sent] = []
        async with _client(url) as client:
            start, number = perf_counter(), 0

            async def work() -> None:
                nonlocal number
                while (perf_counter() - start < seconds) if seconds else (number < len(requests)):
                    mine = requests[number % len(requests)]
                    number = number + 1
                    found.append(await _post(client, start, perf_counter() - start, *mine))

            await asyncio.gather(*(work() for _ in range(connections)))
        return found

    return _without_collector(run())


def _without_collector(job: Any) -> list[Sent]:
    """The garbage collector would stop the client's clock."""
    gc.collect()
    gc.disable()
    try:
        return asyncio.run(job)
    finally:
        gc.enable()
