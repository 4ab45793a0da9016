"""What is compared with a base that runs every few calls, and ratios within a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import quartiles

from badge_peft.evaluation.timing import Runner, take_turns

Call = Callable[[], Any]
_CHUNK = 4  # calls between two of the base


@dataclass
class Timing:
    """Times of one call, of the base beside it (the mean of the two around it), and of the base without its blocks
    where that was measured; [R] each, one per round."""

    seconds: list[float]
    base_seconds: list[float]
    outside_seconds: list[float] | None = None

    def summary(self, share: float) -> dict[str, float]:
        """Milliseconds, and ratios round by round: median and quartiles.

        `ratio` is time / (share of the base's time). `limit_ratio` is time / (what the base pays outside of its blocks
        + share of what it pays in them): no call that is right can do with less.
        """
        seconds = np.asarray(self.seconds)
        base = np.asarray(self.base_seconds)
        found = {"rounds": len(seconds), **_ratios("ratio", seconds / (share * base))}
        for name, values in (("", seconds), ("base_", base)):
            found |= {f"{name}p{q}_ms": 1e3 * float(np.quantile(values, q / 100)) for q in (50, 95)}
        if self.outside_seconds is not None:
            outside = np.asarray(self.outside_seconds)
            found["outside_p50_ms"] = 1e3 * float(np.median(outside))
            found |= _ratios("limit_ratio", seconds / (outside + share * (base - outside)))
        return found


def _ratios(name: str, values: np.ndarray) -> dict[str, float]:
    return dict(zip((f"{name}_q1", name, f"{name}_q3"), quartiles(values), strict=True))


def against_base(
    base: Call,
    calls: Mapping[str, Call],
    rounds: int,
    outside: Call | None = None,
    warmup: int = 2,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Timing]:
    """Times every call `rounds` times. A round goes base, four calls, base, four calls, ..., base, and starts at
    another call each time; `outside`, the base without its blocks, has a turn behind each of the base's."""
    count = len(calls)
    bases = [base] if outside is None else [base, outside]
    first = len(bases)

    def order(turn: int) -> list[int]:
        rotated = [first + (turn + i) % count for i in range(count)]
        chunks = [rotated[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
        return [*range(first), *(place for chunk in chunks for place in (*chunk, *range(first)))]

    runners = [run_alone(call, device) for call in (*bases, *calls.values())]
    timed = take_turns(runners, [None], rounds, warmup=[None] * warmup, order=order, **options)
    found = {}
    for i, name in enumerate(calls):
        chunk = [(i - turn) % count // _CHUNK for turn in range(rounds)]  # in which the call was, round by round
        around = [
            [float(times[turn, c : c + 2].mean()) for turn, c in enumerate(chunk)]
            for times in (np.reshape(x.seconds, (rounds, -1)) for x in timed[:first])  # [R, chunks + 1]
        ]
        found[name] = Timing(timed[first + i].seconds, *around)
    return found


def run_alone(call: Call, device: str = "cpu") -> Runner:
    """Times a call that needs nothing, and keeps nothing of what it computes."""
    return Runner(lambda _: call(), read=lambda _: None, device=device)
