"""Exported files of one model, and sessions on them.

Idle threads of one session spin by default, and would take cores from whatever takes its turn after it: every session
here is told not to (`session.intra_op.allow_spinning` = 0).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latency_parts.forced import Forced


class Sessions:
    """Files of `forced` in `folder`; one that is there is not exported again. A session has `threads`."""

    def __init__(self, forced: Forced, folder: Path, threads: int) -> None:
        self.forced = forced
        self.folder = folder
        self.threads = threads

    def plain(self, int8: bool = False, blocks: bool = True) -> Callable[..., Any]:
        """The base model at full depth, without exits: numpy inputs [B, S] -> logits [B, K]. Without `blocks`, what is
        outside of them."""
        from badge_peft.export import export_full_depth
        from badge_peft.export.runtime import open_session

        path = self._folder("plain" if blocks else "outside", int8) / "model.onnx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            export_full_depth(self.forced.stock if blocks else self.forced.outside, path, int8=int8)
        session = open_session(path, self.threads)
        taken = [entry.name for entry in session.get_inputs()]
        return lambda **inputs: session.run(None, {name: inputs[name] for name in taken})

    def early(self, int8: bool = False) -> Callable[..., Any]:
        """The file with early exits: numpy inputs [B, S] -> an output with `logits` [B, K] and `exit_layer` [B]."""
        from badge_peft.export import OnnxEarlyExitModel, export_onnx

        folder = self._folder("early", int8)
        if not (folder / "model.onnx").exists():
            export_onnx(self.forced.model, folder, int8=int8)
        return OnnxEarlyExitModel.from_pretrained(folder, threads=self.threads, spinning=False)

    def tasks(self, names: Sequence[str], int8: bool) -> Callable[..., Any]:
        """The file of many tasks: numpy inputs [B, S] -> such an output by task."""
        from badge_peft.export import OnnxTasksModel, export_tasks_onnx

        folder = self._folder(f"tasks-{len(names)}", int8)
        if not (folder / "model.onnx").exists():
            export_tasks_onnx(self.forced.model, folder, tasks=names, int8=int8)
        return OnnxTasksModel.from_pretrained(folder, threads=self.threads, spinning=False)

    def _folder(self, name: str, int8: bool) -> Path:
        return self.folder / f"{name}{'-int8' if int8 else ''}"


def to_numpy(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What BERT's tokenizer gives, [B, S] int64."""
    filled = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    return {name: value.numpy().astype(np.int64) for name, value in filled.items()}


def has_onnx() -> bool:
    """Whether the extra `onnx` is installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
