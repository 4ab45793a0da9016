"""Processes that are killed while they write: SIGKILL at a random moment, in a process of its own each time.

The processes are forks of this one, so that what is killed is the work and not the imports before it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable


def undisturbed(work: Callable[[], object]) -> float:
    """Runs `work` in a process of its own, to the end. Returns the seconds it took."""
    start = time.perf_counter()
    if not _finishes(work, None):
        raise RuntimeError("the work fails even where nothing kills it")
    return time.perf_counter() - start


def kill_at_random(
    prepare: Callable[[], object],
    work: Callable[[], object],
    state: Callable[[], str],
    times: int,
    seed: int = 0,
    early: float = 3,
) -> Counter[str]:
    """Kills `work` `times` times.

    Args:
        prepare: Brings the folder into its old state; before each.
        work: What is killed: it brings the folder into its new state.
        state: What the folder is in afterwards: `old`, `new`, or what is wrong with it.
        times: How often.
        seed: Of the moments, in the time that the work takes.
        early: With 1 all of them are alike; with more, more of them are early, as weights are written before cards,
            and with less late, as they are written after a training.

    Returns:
        How often the folder was in which state.
    """
    prepare()
    whole = undisturbed(work)
    if state() != "new":
        return Counter({f"after the whole work: {state()}": 1})
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    # the first is killed as it starts: on a machine that slows down or speeds up, some have to come in time
    for moment in (0.0, *(whole * draw.random() ** early for _ in range(times - 1))):
        prepare()
        _finishes(work, moment)
        found[state()] += 1
    return found


def _finishes(work: Callable[[], object], seconds: float | None) -> bool:
    """Whether `work` comes to its end, in a fork that is killed after `seconds` (None: never)."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:  # the parent must not go on twice
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
