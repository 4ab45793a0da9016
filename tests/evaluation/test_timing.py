"""The clock: who runs when, what is timed, and what is kept. No test looks at how fast anything is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest

from badge_peft.evaluation import timing
from badge_peft.evaluation.timing import Runner, take_turns


class Clock:
    """A clock that stands still unless a call moves it, and the names of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def runner(self, name: str, seconds: float = 1.0, **parts: Any) -> Runner:
        def run(batch: Any) -> Any:
            self.calls.append(f"{name}{batch}")
            self.now += seconds
            return batch

        return Runner(run, **parts)

    def moves(self, value: Any) -> Any:
        """Takes time that must not count."""
        self.now += 100.0
        return value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_another_one_is_first_each_time(clock: Clock) -> None:
    take_turns([clock.runner(name) for name in "abc"], [0, 1, 2, 3])
    assert clock.calls == "a0 b0 c0 b1 c1 a1 c2 a2 b2 a3 b3 c3".split()
    clock.calls.clear()
    take_turns([clock.runner(name) for name in "ab"], [0, 1], rounds=2)
    assert clock.calls == "a0 b0 b0 a0 b1 a1 a1 b1".split()


def test_the_run_alone_is_timed(clock: Clock) -> None:
    @contextmanager
    def around() -> Any:
        clock.now += 100.0
        yield
        clock.now += 100.0

    runner = clock.runner("a", 2.0, prepare=clock.moves, read=clock.moves, around=around)
    (found,) = take_turns([runner], [0, 1], rounds=3)
    assert found.seconds == [2.0] * 6 and found.outputs == [0, 1]


def test_what_is_prepared_runs_and_what_is_read_is_kept() -> None:
    runner = Runner(lambda x: x + 1, prepare=lambda batch: 10 * batch, read=str)
    assert take_turns([runner], [1, 2])[0].outputs == ["11", "21"]


def test_the_last_output_of_each_batch_is_kept() -> None:
    calls = iter(range(10))
    (found,) = take_turns([Runner(lambda batch: (batch, next(calls)))], ["x", "y"], rounds=2)
    assert found.outputs == [("x", 1), ("y", 3)] and len(found.seconds) == 4


def test_rounds_of_warming_up_do_not_count(clock: Clock) -> None:
    found = take_turns([clock.runner(name) for name in "ab"], [0], warmup=["w", "v"])
    assert sorted(clock.calls[:2]) == ["aw", "bw"] and sorted(clock.calls[2:4]) == ["av", "bv"]
    assert [len(timed.seconds) for timed in found] == [1, 1]


def test_an_order_of_ones_own(clock: Clock) -> None:
    def order(turn: int) -> list[int]:
        return [0, 1, 0] if turn >= 0 else [1]

    found = take_turns([clock.runner(name) for name in "ab"], [0], rounds=2, warmup=["w"], order=order)
    assert clock.calls == "bw a0 b0 a0 a0 b0 a0".split()
    assert [len(timed.seconds) for timed in found] == [4, 2]


def test_only_the_second_of_two_calls_in_a_row_counts(clock: Clock) -> None:
    last = ""

    def call(name: str) -> Callable[[Any], None]:
        def run(batch: Any) -> None:
            nonlocal last
            clock.now += 1.0 if last == name else 5.0  # cold caches
            last = name

        return run

    runners = [Runner(call("a")), Runner(call("b"))]
    for settle, seconds in ((False, 5.0), (True, 1.0)):
        assert take_turns(runners, [0, 1, 2], order=lambda turn: [0, 1], settle=settle)[0].seconds == [seconds] * 3


@pytest.mark.parametrize(("batches", "calls"), [("xyz", "az ax ax ay ay az"), ("x", "ax ax")])
def test_a_settled_call_follows_one_on_the_batch_before(clock: Clock, batches: str, calls: str) -> None:
    (found,) = take_turns([clock.runner("a")], batches, settle=True)
    assert clock.calls == calls.split()
    assert found.outputs == [*batches] and found.seconds == [1.0] * len(batches)


def test_a_pause_is_before_each_call(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(timing.time, "sleep", pauses.append)
    take_turns([clock.runner("a"), clock.runner("b")], [0, 1], pause=0.25)
    assert pauses == [0.25] * 4
