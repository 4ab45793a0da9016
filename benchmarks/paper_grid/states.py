"""What the exits of a frozen backbone read of a task's rows: computed once, for all runs of the task."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from badge_peft import cache_states
from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.early_exit.state_passes import RecordingPass
from badge_peft.model import get_badge_model
from badge_peft.tuner.architectures import block_names, exit_norm
from badge_peft.tuner.bypass import apply_norm
from paper_grid.data import Row

BATCH_SIZE = 64
BLOCK, NONE = "block None False None False", "none None False None False"  # `_reads` of plain exits


class SharedStates:
    """The states of the task that is at hand. A run of another task closes them, so that a grid that goes task by task
    makes each once, in the room of one task.

    Args:
        folder: Where those lie that do not fit into memory.
    """

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
        """The states of `rows`, by one pass of the model where they are not known.

        Args:
            task: What tells rows and backbone from others.
            run: Its adapter says what is read; with `bf16` the pass runs under autocast.
            model: With an adapter.
            split: Of the task.
            rows: Of the split.
            collate: Makes a batch.
        """
        if task != self._task:
            self.close()
            self._task = task
        key = (split, _reads(run))
        whole = self._known.get((split, BLOCK))
        if key[1] == NONE and whole is not None and not get_badge_model(model).layout.pre_norm:
            self._known.setdefault(key, means_of(whole, model, rows, collate))
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


def means_of(whole: CachedStates, model: Any, rows: list[Row], collate: Callable[[list[Any]], Any]) -> CachedStates:
    """What exits without a bypass read, the mean over the positions of H_m, from what those with one at `block` read:
    H_0 to H_{M-1}, and H_{M,F}, of which H_M is the LayerNorm.

    Args:
        whole: States of all positions.
        model: With an adapter without bypasses.
        rows: Whose states they are.
        collate: Makes a batch.
    """
    badge = get_badge_model(model)
    last = badge.num_blocks
    norm = exit_norm(badge.model, block_names(badge.model, badge.layout)[-1], badge.layout)
    stored, found = whole._states, None
    assert stored is not None  # exits with a bypass read some
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for start in range(0, len(rows), BATCH_SIZE):
        numbers = order[start : start + BATCH_SIZE]
        mask = collate([rows[i] for i in numbers])["attention_mask"]
        states = dict(zip(whole.plan.states, stored.batch(numbers, mask.shape[1], torch.float32), strict=True))
        recording = RecordingPass.of(badge, {"attention_mask": mask})
        for state in recording.plan.states:
            with torch.no_grad():
                output = states[state] if state[0] < last else apply_norm(norm, states[last, "ffn_sum"])
            recording.states[state] = recording.plan.reduce(output, recording.pooling)
        if found is None:
            found = CachedStates([len(row["input_ids"]) for row in rows], torch.float16, recording, None)
            found.allocate()
            found.texts, found.backbone = whole.texts, whole.backbone
        found.put(numbers, recording, None)
    assert found is not None  # a split has rows
    return found


def _reads(run: dict[str, Any]) -> str:
    """Adapters with the same answer read the same states."""
    adapter = run["adapter"]
    attends = adapter.get("exit_type") == "mha"
    more = run["exit_0"] and adapter["placement"] != "block"  # where the first bypass reads what exit 0 reads
    return f"{adapter['placement']} {adapter.get('exit_layers')} {more} {run['depth']} {attends}"
