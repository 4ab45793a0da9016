"""What stays in a process after many calls: objects, traced memory, resident memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from .requests import Request, answer, draw_requests, make_service

TRACED = 2000  # calls of which Python's memory is traced, which takes five times as long
DIFFERENT = 40  # requests, made again and again: after two rounds the caches of torch and of policies are full


@dataclass(frozen=True)
class Growth:
    """From the end of the warm-up to the end.

    Args:
        calls: How many there were.
        objects: That Python's garbage collector knows, more than before.
        traced: Bytes of Python's own memory, of `TRACED` more calls at most.
        resident: Bytes of the process, tensors included; 0 where the system does not say.
    """

    calls: int
    objects: int
    traced: int
    resident: int


def grow(calls: int, seed: int = 5) -> Growth:
    """Makes `calls` mixed calls: early exit, full depth, adapters by row."""
    model, waiting = make_service(), cycle(draw_requests(DIFFERENT, seed))
    _serve(model, waiting, 2 * DIFFERENT)
    before = _measure()
    _serve(model, waiting, calls)
    after = _measure()
    tracemalloc.start()
    _serve(model, waiting, DIFFERENT)
    first = _traced()
    _serve(model, waiting, min(calls, TRACED))
    last = _traced()
    tracemalloc.stop()
    return Growth(calls, after[0] - before[0], last - first, after[1] - before[1])


def _serve(model: Any, requests: Iterator[Request], calls: int) -> None:
    for _ in range(calls):
        answer(model, next(requests))


def _measure() -> Sequence[int]:
    gc.collect()
    return len(gc.get_objects()), _resident()


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def _resident() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))
