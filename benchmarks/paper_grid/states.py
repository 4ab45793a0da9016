"""What the exits of a frozen backbone read of a task's rows: computed once, for all runs of the task."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from badge_peft import cache_states
from badge_peft.early_exit.cached_states import CachedStates
from paper_grid.data import Row

BATCH_SIZE = 64


class SharedStates:
    """The states of the task that is at hand; those that do not fit into memory lie in `folder`. A run of another task
    closes them, so that a grid that goes task by task makes each once, in the room of one task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._task = ""
        self._known: dict[tuple[str, str], CachedStates] = {}

    def of(
        self,
        task: str,
        run: dict[str, Any],
        model: Any,
        split: str,
        rows: list[Row],
        collate: Callable[[list[Any]], Any],
    ) -> CachedStates:
        """The states of a split's `rows`, by one pass of the model where they are not known. The run's adapter says
        what is read; with `bf16` the pass runs under autocast."""
        if task != self._task:
            self.close()
            self._task = task
        key = (split, _reads(run))
        if key not in self._known:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.folder.mkdir(parents=True, exist_ok=True)
            with torch.autocast(device, torch.bfloat16) if run["bf16"] else nullcontext():
                self._known[key] = cache_states(
                    model, rows, data_collator=collate, batch_size=BATCH_SIZE, folder=self.folder
                )
        return self._known[key]

    def close(self) -> None:
        """Gives memory and files back."""
        for states in self._known.values():
            states.close()
        self._known.clear()


def _reads(run: dict[str, Any]) -> str:
    """Adapters with the same answer read the same states."""
    adapter = run["adapter"]
    attends = adapter.get("exit_type") == "mha"
    more = run["exit_0"] and adapter["placement"] != "block"  # where the first bypass reads what exit 0 reads
    return f"{adapter['placement']} {adapter.get('exit_layers')} {more} {run['depth']} {attends}"
