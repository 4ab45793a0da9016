"""The ways to answer many tasks for the same rows, in PyTorch and in ONNX Runtime: one pass, a call for each task, a
stock model for each.

Each task has an adapter whose exits are sure of their answer from one block on, whatever the row, and so stops at the
block after it: these are spread evenly from 2 to M. All decide at every exit (DGE), alone and together. In ONNX
Runtime one file of one adapter stands for the files of all: there the first token of a row says where it stops
(`latency_parts/forced.py`), and as many exits decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_parts.forced import SURE, Forced, add_copy, exits_of
from latency_parts.onnx_runs import Sessions, to_numpy

Call = Callable[[], list[list[int]]]

ONE_PASS, DEEPEST, EACH, STOCK = "one pass", "deepest alone", "a call each", "stock models"
ENGINES = {"torch": "PyTorch", "onnx": "ONNX Runtime", "int8": "ONNX Runtime, int8"}


def stops(tasks: int, blocks: int) -> list[int]:
    """[T], the block at which each task stops: from 2 to M, the last the deepest."""
    return [int(number) for number in np.linspace(blocks if tasks == 1 else 2, blocks, tasks).round()]


class TorchWays:
    """All of them in PyTorch.

    Args:
        forced: The model.
    """

    def __init__(self, forced: Forced) -> None:
        self.forced = forced

    def calls(self, tasks: int, rows: int, length: int) -> dict[str, Call]:
        """By name; each returns the exits [T][B] of the tasks that it answers. `STOCK` is one of the stock models."""
        model, stock, names = self.forced.model, self.forced.stock, add_stopping(self.forced, tasks)
        batch = self.forced.batch([2] * rows, length)

        def one_pass() -> list[list[int]]:
            out = model.early_exit_forward(**batch, tasks=names)
            return [exits_of(out[name]) for name in names]

        def alone(name: str) -> list[int]:  # without switching
            return exits_of(model.early_exit_forward(**batch, tasks=[name])[name])

        def stock_model() -> list[list[int]]:
            stock(**batch)
            return []

        return {
            DEEPEST: lambda: [alone(names[-1])],
            ONE_PASS: one_pass,
            EACH: lambda: [alone(name) for name in names],
            STOCK: stock_model,
        }


class OnnxWays:
    """All of them in ONNX Runtime.

    Args:
        forced: The model.
        folder: Where its files are; what is missing there is exported.
        threads: Of a session.
        int8: Of all files.
    """

    def __init__(self, forced: Forced, folder: Path, threads: int, int8: bool) -> None:
        self.forced, self.int8 = forced, int8
        self.sessions = TaskSessions(forced, folder, threads)
        self.stock = self.sessions.plain(int8)
        self.alone = self.sessions.early(int8)

    def calls(self, tasks: int, rows: int, length: int) -> dict[str, Call]:
        """As `TorchWays.calls`."""
        names = add_stopping(self.forced, tasks)
        together = self.sessions.tasks(names, self.int8)
        blocks = stops(tasks, self.forced.size.blocks)
        batch = to_numpy(self.forced.batch([2] * rows, length))
        own = [to_numpy(self.forced.batch([m] * rows, length)) for m in blocks]

        def one_pass() -> list[list[int]]:
            out = together(**batch)
            return [exits_of(out[name]) for name in names]

        def stock_model() -> list[list[int]]:
            self.stock(**batch)
            return []

        return {
            DEEPEST: lambda: [exits_of(self.alone(**own[-1]))],
            ONE_PASS: one_pass,
            EACH: lambda: [exits_of(self.alone(**inputs)) for inputs in own],
            STOCK: stock_model,
        }


class TaskSessions(Sessions):
    """Files of one task each, and of many."""

    def tasks(self, names: Sequence[str], int8: bool) -> Callable[..., Any]:
        """The file of these tasks: numpy inputs [B, S] -> by task `logits` [B, K] and `exit_layer` [B]."""
        from badge_peft.export import OnnxTasksModel, export_tasks_onnx

        folder = self.folder / f"tasks-{len(names)}{'-int8' if int8 else ''}"
        if not (folder / "model.onnx").exists():
            export_tasks_onnx(self.forced.model, folder, tasks=names, int8=int8)
        return OnnxTasksModel.from_pretrained(folder, threads=self.threads, spinning=False)


@torch.no_grad()
def add_stopping(forced: Forced, tasks: int) -> list[str]:
    """Gives the model `tasks` adapters, each of which stops at its own block, and returns their names."""
    names = []
    for i, stop in enumerate(stops(tasks, forced.size.blocks)):
        names.append(f"task{i}_of_{tasks}")
        if names[-1] in forced.model.peft_config:
            continue
        add_copy(forced, names[-1])
        badge = forced.model.base_model
        for number in badge.exit_layers(names[-1])[:-1]:  # the last is the model's own head
            linear = badge.block_at(number).own_exit(names[-1], number).linear
            linear.weight.zero_()
            linear.bias.copy_(torch.tensor([SURE if number >= stop - 1 else 0.0, 0.0]))
    return names
