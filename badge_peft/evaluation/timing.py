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
from tqdm.auto import tqdm


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Runner:
    """One way to run a model. `run` alone is timed."""

    run: Callable[[Any], Any]  # from what `prepare` made to an output
    prepare: Callable[[Any], Any] = _same  # from a batch to what `run` takes
    read: Callable[[Any], Any] = _same  # from an output to what is kept of it
    device: torch.device | str = "cpu"  # on CUDA the clock waits for it
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # makes a context to run in


@dataclass
class Timed:
    """What the clock has of one runner."""

    seconds: list[float] = field(default_factory=list)  # of each call, [batches * rounds]
    outputs: list[Any] = field(default_factory=list)  # of each batch, what `read` made of the last call


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
    """Times every runner on every batch, `rounds` times before the next batch; one entry per runner.

    Args:
        runners: What is compared.
        batches: What they run on.
        rounds: On each batch.
        warmup: Batches of rounds before the first that counts, one each.
        order: Number of a round, below 0 where it does not count -> places in `runners`, in the order in which they
            run in that round; one may come several times. None: each once, and another one is first each time.
        pause: Seconds before each call. Where two runtimes take turns, the threads of the one that has just finished
            spin for a while and would take cores from the other.
        settle: Each call follows one of the same runner on the batch before, which does not count: with its weights in
            the caches, as in a service that runs one model on one text after another.
        progress: Name of a progress bar over the batches; empty: none.
    """

    def rotated(turn: int) -> Sequence[int]:
        first = (turn // rounds + turn % rounds) % len(runners)  # another one for each batch, too
        return [*range(first, len(runners)), *range(first)]

    found = [Timed() for _ in runners]
    for turn, batch in enumerate(warmup, start=-len(warmup)):
        for which in (order or rotated)(turn):
            _timed(runners[which], batch, pause)
    for i, batch in enumerate(tqdm(batches, desc=progress, disable=not progress)):
        before = batches[i - 1 : i] or batches[-1:] if settle else ()
        for turn in range(i * rounds, (i + 1) * rounds):
            for which in (order or rotated)(turn):
                seconds, output = _timed(runners[which], batch, pause, before)
                found[which].seconds.append(seconds)
                found[which].outputs[i:] = [output]
    return found


def _timed(runner: Runner, batch: Any, pause: float, before: Sequence[Any] = ()) -> tuple[float, Any]:
    """Seconds of one call, and what was read from it; batches `before` it do not count."""
    inputs = runner.prepare(batch)
    untimed = [runner.prepare(each) for each in before]
    cuda = torch.device(runner.device).type == "cuda"
    with runner.around():
        if pause:
            time.sleep(pause)
        for each in untimed:
            runner.run(each)
        if cuda:
            torch.cuda.synchronize(runner.device)
        start = time.perf_counter()
        output = runner.run(inputs)
        if cuda:
            torch.cuda.synchronize(runner.device)
        seconds = time.perf_counter() - start
    return seconds, runner.read(output)
