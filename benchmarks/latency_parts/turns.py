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
    """

    seconds: list[float]
    base_seconds: list[float]

    def summary(self, share: float) -> dict[str, float]:
        """Milliseconds, and the ratio time / (share of the base's time), round by round: median and quartiles.

        Args:
            share: Of the base's blocks: k/M for a row that leaves at block k.
        """
        ratios = np.divide(self.seconds, self.base_seconds) / share
        return {
            "p50_ms": 1e3 * float(np.quantile(self.seconds, 0.5)),
            "p95_ms": 1e3 * float(np.quantile(self.seconds, 0.95)),
            "base_p50_ms": 1e3 * float(np.quantile(self.base_seconds, 0.5)),
            "base_p95_ms": 1e3 * float(np.quantile(self.base_seconds, 0.95)),
            "ratio": float(np.median(ratios)),
            "ratio_q1": float(np.quantile(ratios, 0.25)),
            "ratio_q3": float(np.quantile(ratios, 0.75)),
            "rounds": len(ratios),
        }


def against_base(
    base: Call,
    calls: Mapping[str, Call],
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
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
        device: Where all of them run.
        pause: As `take_turns` has it.
        settle: As `take_turns` has it.
    """
    count = len(calls)

    def order(turn: int) -> list[int]:  # 0 is the base
        rotated = [1 + (turn + i) % count for i in range(count)]
        chunks = [rotated[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
        return [0, *(place for chunk in chunks for place in (*chunk, 0))]

    runners = [
        Runner(lambda _, call=call: call(), read=lambda _: None, device=device) for call in (base, *calls.values())
    ]
    base_times, *times = take_turns(
        runners, [None], rounds, warmup=[None] * warmup, order=order, pause=pause, settle=settle
    )
    around = np.reshape(base_times.seconds, (rounds, -1))  # [R, chunks + 1]
    found = {}
    for i, (name, timed) in enumerate(zip(calls, times, strict=True)):
        chunk = [(i - turn) % count // _CHUNK for turn in range(rounds)]  # in which the call was in each round
        found[name] = Timing(timed.seconds, [float(around[r, c : c + 2].mean()) for r, c in enumerate(chunk)])
    return found
