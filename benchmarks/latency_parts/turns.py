"""What is compared with a base that runs every few calls, and ratios within a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from badge_peft.evaluation.timing import Runner, take_turns

Call = Callable[[], Any]
_CHUNK = 4  # calls between two of the base


@dataclass
class Timing:
    """Times of one call, and of the base beside it.

    Args:
        seconds: [R], one per round.
        base_seconds: [R], the mean of the two base calls around it.
        outside_seconds: [R], the same of the base without its blocks, where that was measured.
    """

    seconds: list[float]
    base_seconds: list[float]
    outside_seconds: list[float] | None = None

    def summary(self, share: float) -> dict[str, float]:
        """Milliseconds, and ratios round by round: median and quartiles.

        `ratio` is time / (share of the base's time). `limit_ratio` is time / (what the base pays outside of its blocks
        + share of what it pays in them): no call that is right can do with less.

        Args:
            share: Of the base's blocks: k/M for a row that leaves at block k.
        """
        seconds, base = np.asarray(self.seconds), np.asarray(self.base_seconds)
        found = {"p50_ms": 1e3 * float(np.quantile(seconds, 0.5)), "p95_ms": 1e3 * float(np.quantile(seconds, 0.95))}
        found |= {
            "base_p50_ms": 1e3 * float(np.quantile(base, 0.5)),
            "base_p95_ms": 1e3 * float(np.quantile(base, 0.95)),
        }
        found |= _quartiles("ratio", seconds / (share * base))
        if self.outside_seconds is not None:
            outside = np.asarray(self.outside_seconds)
            found["outside_p50_ms"] = 1e3 * float(np.quantile(outside, 0.5))
            found |= _quartiles("limit_ratio", seconds / (outside + share * (base - outside)))
        return {**found, "rounds": len(seconds)}


def _quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    return {name if q == 2 else f"{name}_q{q}": float(np.quantile(values, q / 4)) for q in (2, 1, 3)}


def against_base(
    base: Call,
    calls: Mapping[str, Call],
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
    pause: float = 0.0,
    settle: bool = False,
    outside: Call | None = None,
) -> dict[str, Timing]:
    """Times every call `rounds` times. A round goes base, four calls, base, four calls, ..., base, and starts at
    another call each time.

    Args:
        base: What all are compared with.
        calls: By name.
        rounds: R.
        warmup: Rounds before the first that counts.
        device: Where all of them run.
        pause: As `take_turns` has it.
        settle: As `take_turns` has it.
        outside: The base without its blocks; it has a turn behind each of the base's.
    """
    count = len(calls)
    bases = [base] if outside is None else [base, outside]
    first = len(bases)

    def order(turn: int) -> list[int]:
        rotated = [first + (turn + i) % count for i in range(count)]
        chunks = [rotated[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
        return [*range(first), *(place for chunk in chunks for place in (*chunk, *range(first)))]

    runners = [Runner(lambda _, call=call: call(), read=_nothing, device=device) for call in (*bases, *calls.values())]
    timed = take_turns(runners, [None], rounds, warmup=[None] * warmup, order=order, pause=pause, settle=settle)
    found = {}
    for i, name in enumerate(calls):
        chunk = [(i - turn) % count // _CHUNK for turn in range(rounds)]  # in which the call was, round by round
        around = [
            [float(times[turn, c : c + 2].mean()) for turn, c in enumerate(chunk)]
            for times in (np.reshape(x.seconds, (rounds, -1)) for x in timed[:first])  # [R, chunks + 1]
        ]
        found[name] = Timing(timed[first + i].seconds, *around)
    return found


def _nothing(output: Any) -> None:
    """Keeps nothing of what was computed."""
