"""`take_turns`: one clock for whatever is compared.

All of it runs side by side, batch by batch, so that a machine that slows down slows all. (`torch.utils.benchmark`
times one statement after another.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Runner:
    """One way to run a model. `run` alone is timed.

    Args:
        run: From what `prepare` made to an output.
        prepare: From a batch to what `run` takes.
        read: From an output to what is kept of it.
        device: Where it runs; on CUDA the clock waits for the device.
        around: Makes a context to run in.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = _same
    read: Callable[[Any], Any] = _same
    device: torch.device | str = "cpu"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Timed:
    """What the clock has of one runner: the seconds of each call, [batches * rounds], and of each batch what `read`
    made of the last call."""

    seconds: list[float] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


def take_turns(
    runners: Sequence[Runner],
    batches: Sequence[Any],
    rounds: int = 1,
    *,
    warmup: Sequence[Any] = (),
    order: Callable[[int], Sequence[int]] | None = None,
    pause: float = 0.0,
    settle: bool = False,
    progress: str = "",
) -> list[Timed]:
    """Times every runner on every batch, `rounds` times.

    Args:
        runners: What is compared.
        batches: What they run on.
        rounds: Rounds on each batch before the next batch.
        warmup: Batches of rounds before the first that counts, one each.
        order: Number of a round, below 0 where it does not count -> places in `runners`, in the order in which they
            run in that round; one may come several times. None: each once, and another one is first each time.
        pause: Seconds before each call. Where two runtimes take turns, the threads of the one that has just finished
            spin for a while and would take cores from the other.
        settle: Each call comes twice in a row, and the second counts: with its weights in the caches again, as in a
            service that does nothing else.
        progress: Name of a progress bar over the batches; empty: none.

    Returns:
        One entry per runner.
    """
    from tqdm.auto import tqdm

    def rotated(turn: int) -> Sequence[int]:
        first = (turn // rounds + turn % rounds) % len(runners)  # another one for each batch, too
        return [*range(first, len(runners)), *range(first)]

    found = [Timed() for _ in runners]
    for turn, batch in enumerate(warmup, start=-len(warmup)):
        for which in (order or rotated)(turn):
            _timed(runners[which], batch, pause, settle)
    for i, batch in enumerate(tqdm(batches, desc=progress, disable=not progress)):
        for turn in range(i * rounds, (i + 1) * rounds):
            for which in (order or rotated)(turn):
                seconds, output = _timed(runners[which], batch, pause, settle)
                found[which].seconds.append(seconds)
                found[which].outputs[i:] = [output]
    return found


def _timed(runner: Runner, batch: Any, pause: float, settle: bool) -> tuple[float, Any]:
    """Seconds of one call, and what was read from it."""
    inputs = runner.prepare(batch)
    cuda = torch.device(runner.device).type == "cuda"
    with runner.around():
        if pause:
            time.sleep(pause)
        if settle:
            runner.run(inputs)
        if cuda:
            torch.cuda.synchronize(runner.device)
        start = time.perf_counter()
        output = runner.run(inputs)
        if cuda:
            torch.cuda.synchronize(runner.device)
        seconds = time.perf_counter() - start
    return seconds, runner.read(output)
