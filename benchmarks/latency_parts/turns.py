"""Timing by turns: what is compared runs side by side, round by round, so that a machine that slows down slows all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[], Any]
_CHUNK = 4  # calls between two of the base


@dataclass
class Timing:
    """Times of one call, and of the base beside it.

    Args:
        seconds: [R], one per round.
        base_seconds: [R], the mean of the two base calls around it.
    """

    seconds: list[float] = field(default_factory=list)
    base_seconds: list[float] = field(default_factory=list)

    def summary(self, share: float) -> dict[str, float]:
        """Milliseconds, and the ratio time / (share of the base's time), round by round: median and quartiles.

        Args:
            share: Of the base's blocks: k/M for a row that leaves at block k.
        """
        ratios = [t / (share * b) for t, b in zip(self.seconds, self.base_seconds, strict=True)]
        return {
            "p50_ms": 1e3 * quantile(self.seconds, 0.5),
            "p95_ms": 1e3 * quantile(self.seconds, 0.95),
            "base_p50_ms": 1e3 * quantile(self.base_seconds, 0.5),
            "base_p95_ms": 1e3 * quantile(self.base_seconds, 0.95),
            "ratio": statistics.median(ratios),
            "ratio_q1": quantile(ratios, 0.25),
            "ratio_q3": quantile(ratios, 0.75),
            "rounds": len(ratios),
        }


def take_turns(
    base: Call,
    calls: Mapping[str, Call],
    rounds: int,
    warmup: int = 2,
    wait: Call | None = None,
    pause: float = 0.0,
    settle: bool = False,
) -> dict[str, Timing]:
    """Times every call `rounds` times. A round goes base, four calls, base, four calls, ..., base, and starts at
    another call each time.

    Args:
        base: What all are compared with.
        calls: By name.
        rounds: R.
        warmup: Rounds before the first that counts.
        wait: Ends when the device has finished, for CUDA.
        pause: Seconds before each call. Where two runtimes take turns, the threads of the one that has just finished
            spin for a while and would take cores from the other.
        settle: Each call comes twice in a row, and the second counts: with its weights in the caches again, as in a
            service that does nothing else.
    """
    names = list(calls)
    found = {name: Timing() for name in names}

    def timed(call: Call) -> float:
        if pause:
            time.sleep(pause)
        if settle:
            call()
        if wait is not None:
            wait()
        start = time.perf_counter()
        call()
        if wait is not None:
            wait()
        return time.perf_counter() - start

    for turn in range(-warmup, rounds):
        first = turn % len(names)
        order = names[first:] + names[:first]
        before = timed(base)
        for part in range(0, len(order), _CHUNK):
            taken = {name: timed(calls[name]) for name in order[part : part + _CHUNK]}
            after = timed(base)
            if turn >= 0:
                for name, seconds in taken.items():
                    found[name].seconds.append(seconds)
                    found[name].base_seconds.append((before + after) / 2)
            before = after
    return found


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, linear between two values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
