"""The loop over a grid: search what has not been searched, run what has not been run, go on after a failure."""

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

Trainer = Callable[[dict[str, Any]], dict[str, Any]]


class Loop:
    """Goes through runs in order.

    Args:
        settings: The grid.
        store: Results that are there and those to come.
        train: Trains one run and stores it.
        minutes: Nothing is started after so many; None never stops.
    """

    def __init__(self, settings: Settings, store: Store, train: Trainer, minutes: float | None = None) -> None:
        self.settings, self.store, self.train = settings, store, train
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.failed: list[str] = []
        self._given_up: set[str] = set()

    def search(self, runs: list[Run]) -> None:
        """The trials that these runs need."""
        for run in runs:
            if not self.time_is_up():
                self._search(run)

    def run(self, runs: list[Run]) -> None:
        """The runs, each after the trials that it needs."""
        for i, run in enumerate(runs, start=1):
            if self.time_is_up():
                print(f"time is up: {len(runs) - i + 1} of {len(runs)} runs not looked at; the same command goes on")
                return
            if not self._search(run):
                continue
            settled, source = choose(self.settings, run, self.store)
            if self.store.read(settled) is None:
                rates = f"lr {settled['adapter_lr']:g} / {settled['backbone_lr']:g} ({source})"
                self._one(settled, f"[{i}/{len(runs)}] {run.label} {rates}")

    def time_is_up(self) -> bool:
        """Whether nothing more may be started."""
        return self.end is not None and time.monotonic() >= self.end

    def _search(self, run: Run) -> bool:
        """Whether the rates are settled."""
        base = trial_base(self.settings, run.settings)
        if base is None or choose(self.settings, run, self.store)[1] == "optuna":
            return True
        while True:
            todo, _ = trials(self.settings, base, self.store)
            if not todo:
                return True
            for trial in todo:
                if self.time_is_up():
                    return False
                name = Run("search", trial).label
                text = f"search {name} lr {trial['adapter_lr']:g} / {trial['backbone_lr']:g}"
                if not self._one(trial, text, split="validation"):
                    return False

    def _one(self, settled: dict[str, Any], text: str, split: str = "test") -> bool:
        key = key_of(settled)
        if key in self._given_up:
            return False
        try:
            result = self.train(settled)
        except Exception:
            traceback.print_exc()
            print(f"{text}: FAILED", file=sys.stderr, flush=True)
            self.failed.append(text)
            self._given_up.add(key)
            return False
        score, seconds = result["scores"][split], result["seconds"]["total"]
        print(f"{text}: {split} avg {score['avg']:.4f} best {score['best']:.4f}, {seconds:.0f} s", flush=True)
        return True


def state(settings: Settings, runs: list[Run], store: Store) -> tuple[list[str], list[str]]:
    """What is there and what is missing, trials among it, for `--dry-run`."""
    done, todo, seen = [], [], set()
    for run in runs:
        base = trial_base(settings, run.settings)
        if base is not None:
            missing, race = trials(settings, base, store)
            for rates in race:
                trial = with_rates(base, rates)
                text = f"search {Run('search', trial).label} lr {rates[0]:g} / {rates[1]:g}"
                if text not in seen:
                    seen.add(text)
                    (todo if trial in missing else done).append(text)
        settled, source = choose(settings, run, store)
        (todo if store.read(settled) is None else done).append(f"{run.label} ({source} rates)")
    return done, todo
