"""Replicas that are killed under load: every request is answered rightly, or its client sees an error."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx

from serve_parts.client import FAILED, Sent, saturate
from serve_parts.service import Running

_CONNECTIONS = 4
_TOLERANCE = 1e-5  # of a score; a text's batch changes its rounding


def is_right(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether an answer is the one to this text: label, exit and score, which differs from text to text."""
    same = (found["label"], found["exit_layer"]) == (expected["label"], expected["exit_layer"])
    return same and math.isclose(found["score"], expected["score"], abs_tol=_TOLERANCE)


def count(sent: Sequence[Sent], expected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What became of the requests: how many were answered, all of it rightly or not, and how the others ended."""
    answered = [request for request in sent if request.status == 200]
    wrong = [
        request
        for request in answered
        if len(request.answers) != len(request.rows)
        or not all(is_right(a, expected[i]) for a, i in zip(request.answers, request.rows, strict=True))
    ]
    errors = Counter("connection" if r.status == FAILED else str(r.status) for r in sent if r.status != 200)
    return {
        "requests": len(sent),
        "answered": len(answered),
        "wrong": len(wrong),
        "errors": dict(errors),
    }


def measure(
    service: Running,
    requests: Sequence[tuple[list[int], bytes]],
    expected: Sequence[dict[str, Any]],
    kills: int,
    replicas: int,
    pause: float,
    every: float = 2.0,
    limit: float = 600.0,
) -> dict[str, Any]:
    """Kills a replica `kills` times, each time all have come back and have answered for `pause` seconds; `every` so
    many seconds the requests so far are collected, and after `limit` seconds no more are sent."""
    number_killed = [0]
    done = threading.Event()

    def kill() -> None:
        try:
            for number in range(kills):
                while len(found := _alive(service)) < replicas:
                    time.sleep(0.2)
                time.sleep(pause)
                os.kill(sorted(found)[number % replicas], signal.SIGKILL)
                number_killed[0] += 1
                time.sleep(every / 2)
        finally:
            done.set()

    threading.Thread(target=kill, daemon=True).start()
    sent: list[Sent] = []
    end = time.monotonic() + limit
    while not done.is_set() and time.monotonic() < end:
        sent += saturate(service.url, requests, _CONNECTIONS, seconds=every)
    return {**count(sent, expected), "kills": number_killed[0], "replicas": replicas}


def together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as one."""
    errors: Counter[str] = Counter()
    for run in runs:
        errors.update(run["errors"])
    sums = {name: sum(run[name] for run in runs) for name in ("requests", "answered", "wrong", "kills")}
    return {**sums, "errors": dict(errors), "replicas": runs[-1]["replicas"]}


def _alive(service: Running) -> list[int]:
    """Process numbers of the replicas that run; none where the service does not answer just now."""
    try:
        numbers = service.replicas().values()
    except (httpx.HTTPError, RuntimeError):  # or the client is closed: the measurement has ended
        return []
    return [number for number in numbers if os.path.exists(f"/proc/{number}")]
