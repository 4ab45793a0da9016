"""The loop over a grid: search what has not been searched, run what has not been run, go on after a failure.

Several processes may work on one store: each takes what no other is at.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from paper_grid.plan import Run, key_of
from paper_grid.rates import choose, trial_base, trials, with_rates
from paper_grid.settings import Settings
from paper_grid.store import Store

DONE, BUSY, FAILED = "done", "busy", "failed"  # of a training; busy: another process is at it
_WAIT = 2.0  # seconds


class Loop:
    """Goes through runs in order; `train` trains one run and stores it."""

    def __init__(self, settings: Settings, store: Store, train: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.settings = settings
        self.store = store
        self.train = train
        self.failed: dict[str, str] = {}  # key -> label
        self._started = 0

    def go(self, runs: list[Run]) -> None:
        """Trains what these runs lack, their trials first. Comes back to those that had to wait for another
        process."""
        waiting = list(runs)
        while waiting:
            started, left = self._started, []
            for run in waiting:
                status = self._search(run)
                if status == DONE:
                    settled, source = choose(self.settings, run, self.store)
                    status = self._train(settled, f"{run.label} ({source} rates)", "test")
                if status == BUSY:
                    left.append(run)
            if left and self._started == started:
                time.sleep(_WAIT)
            waiting = left

    def _search(self, run: Run) -> str:
        """Whether the run's rates are settled."""
        base = trial_base(self.settings, run.settings)
        if base is None:
            return DONE
        while True:
            todo, _ = trials(self.settings, base, self.store)
            if not todo:
                return DONE
            found = set()
            for trial in todo:
                found.add(self._train(trial, f"search {Run('search', trial).label}", "validation"))
                if FAILED in found:
                    return FAILED
            if BUSY in found:
                return BUSY

    def _train(self, settled: dict[str, Any], text: str, split: str) -> str:
        key = key_of(settled)
        if self.store.read(settled) is not None:
            return DONE
        if key in self.failed:
            return FAILED
        with self.store.claim(settled) as mine:
            if not mine:
                return BUSY
            if self.store.read(settled) is not None:  # while we looked
                return DONE
            self._started += 1
            text += f" lr {settled['adapter_lr']:g} / {settled['backbone_lr']:g}"
            try:
                result = self.train(settled)
            except Exception:
                traceback.print_exc()
                print(f"{text}: FAILED", file=sys.stderr, flush=True)
                self.failed[key] = text
                return FAILED
        score = result["scores"][split]
        seconds = result["seconds"]["total"]
        print(f"{text}: {split} avg {score['avg']:.4f} best {score['best']:.4f}, {seconds:.0f} s", flush=True)
        return DONE


def state(settings: Settings, runs: list[Run], store: Store) -> tuple[list[str], list[str]]:
    """What is there and what is missing, trials among it, for `--dry-run`."""
    done: dict[str, None] = {}
    todo: dict[str, None] = {}
    for run in runs:
        base = trial_base(settings, run.settings)
        if base is not None:
            missing, race = trials(settings, base, store)
            for rates in race:
                trial = with_rates(base, rates)
                text = f"search {Run('search', trial).label} lr {rates[0]:g} / {rates[1]:g}"
                (todo if trial in missing else done)[text] = None
        settled, source = choose(settings, run, store)
        (todo if store.read(settled) is None else done)[f"{run.label} ({source} rates)"] = None
    return list(done), list(todo)
