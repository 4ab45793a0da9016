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

DIFFERENT = 40  # requests, made again and again: after two rounds the caches of torch and of policies are full


@dataclass(frozen=True)
class Growth:
    """From the end of the warm-up to the end.

    Args:
        calls: How many there were.
        objects: That Python's garbage collector knows, more than before.
        traced: Bytes of Python's own memory.
        resident: Bytes of the process, tensors included; 0 where the system does not say.
    """

    calls: int
    objects: int
    traced: int
    resident: int


def grow(calls: int, seed: int = 5) -> Growth:
    """Makes `calls` mixed calls: early exit, full depth, adapters by row."""
    model, waiting = make_service(), cycle(draw_requests(DIFFERENT, seed))
    _serve(model, waiting, DIFFERENT)
    tracemalloc.start()
    _serve(model, waiting, DIFFERENT)
    before = _measure()
    _serve(model, waiting, calls)
    after = _measure()
    tracemalloc.stop()
    objects, traced, resident = (b - a for a, b in zip(before, after, strict=True))
    return Growth(calls, objects, traced, resident)


def _serve(model: Any, requests: Iterator[Request], calls: int) -> None:
    for _ in range(calls):
        answer(model, next(requests))


def _measure() -> Sequence[int]:
    gc.collect()
    return len(gc.get_objects()), tracemalloc.get_traced_memory()[0], _resident()


def _resident() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))
