"""Experiments in ONNX Runtime, on the CPU: one file with early exits against the plain export of the same model.

Idle threads of one session spin by default, and would take cores from whatever takes its turn after it: every session
here is told not to (`session.intra_op.allow_spinning` = 0).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latency_parts.forced import Forced, exits_of, spread
from latency_parts.rows import Row, make_row
from latency_parts.settings import Settings
from latency_parts.torch_runs import DGE, MIXED, STOCK
from latency_parts.turns import against_base

if TYPE_CHECKING:
    from badge_peft.export.onnx import OnnxExporter
    from badge_peft.export.plain import FullDepthExporter

PLAIN = "plain ONNX export"
PLAIN_INT8 = "plain int8 ONNX export"
HALF_WAY = "ONNX Runtime int8, leaves half-way"
HALF_WAY_COLD = "the same, right after a pass of stock PyTorch"
_PAUSE = 0.01  # seconds between two runtimes


class Sessions:
    """The exported files of one model and sessions on them; a file that is there is not exported again, and all files
    of a model are made of one cut.

    Args:
        forced: The model.
        folder: Where the files are.
        threads: Of a session.
    """

    def __init__(self, forced: Forced, folder: Path, threads: int) -> None:
        self.forced, self.folder, self.threads = forced, folder, threads
        self._plain = cache(self._export_plain)

    def plain(self, int8: bool = False, blocks: bool = True) -> Callable[..., Any]:
        """The base model at full depth, without exits: numpy inputs [B, S] -> logits [B, K]. Without `blocks`, what is
        outside of them."""
        from badge_peft.export.runtime import open_session

        path = self.folder / f"{'plain' if blocks else 'outside'}{'-int8' if int8 else ''}" / "model.onnx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._once(path.parent, lambda: self._plain(blocks).write(path, int8=int8))
        session = open_session(path, self.threads)
        taken = [entry.name for entry in session.get_inputs()]
        return lambda **inputs: session.run(None, {name: inputs[name] for name in taken})

    def early(self, int8: bool = False) -> Callable[..., Any]:
        """The file with early exits: numpy inputs [B, S] -> an output with `logits` [B, K] and `exit_layer` [B]."""
        from badge_peft.export import OnnxEarlyExitModel

        folder = self.folder / f"early{'-int8' if int8 else ''}"
        if not (folder / "model.onnx").exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._once(folder, lambda: self._early.write(folder, int8=int8))
        return OnnxEarlyExitModel.from_pretrained(folder, threads=self.threads, spinning=False)

    def _export_plain(self, blocks: bool) -> FullDepthExporter:
        from badge_peft.export.plain import FullDepthExporter

        return FullDepthExporter(self.forced.stock if blocks else self.forced.outside)

    @cached_property
    def _early(self) -> OnnxExporter:
        from badge_peft.export.onnx import OnnxExporter

        return OnnxExporter(self.forced.model)

    def _once(self, folder: Path, export: Callable[[], Any]) -> None:
        """Exports, and leaves no half-written model behind."""
        try:
            export()
        except BaseException:
            for file in folder.glob("model.onnx*"):
                file.unlink()
            raise


def exits(forced: Forced, settings: Settings, sessions: Sessions, int8: bool = False) -> list[Row]:
    """Batch 1: a row leaves at block k, from block 2 on (DGE cannot stop before)."""
    rows, last = [], forced.size.blocks
    plain, outside, early = sessions.plain(int8), sessions.plain(int8, blocks=False), sessions.early(int8)
    experiment = "onnx-int8" if int8 else "onnx"
    for length in settings.lengths:
        calls = {k: partial(early, **to_numpy(forced.batch([k], length, seed=k))) for k in range(2, last + 1)}
        left = {k: exits_of(call()) for k, call in calls.items()}
        inputs = to_numpy(forced.batch([last], length))
        timings = against_base(
            partial(plain, **inputs),
            {str(k): call for k, call in calls.items()},
            settings.rounds_of(experiment),
            settings.warmup,
            outside=partial(outside, **inputs),
        )
        for k in calls:
            against = PLAIN_INT8 if int8 else PLAIN
            rows.append(make_row(DGE, against, timings[str(k)], last, length, [k], left[k]))
    return rows


def batches(forced: Forced, settings: Settings, sessions: Sessions) -> list[Row]:
    """Rows of a batch leave at blocks 2 to M: the rows that are left are gathered."""
    rows, last = [], forced.size.blocks
    plain, outside = sessions.plain(), sessions.plain(blocks=False)
    early = sessions.early()
    for count, length in settings.onnx_batches:
        wanted = spread(count, last)
        inputs = to_numpy(forced.batch(wanted, length))
        call = partial(early, **inputs)
        left = exits_of(call())
        timings = against_base(
            partial(plain, **inputs),
            {MIXED: call},
            settings.rounds_of("onnx-batch"),
            settings.warmup,
            outside=partial(outside, **inputs),
        )
        rows.append(make_row(MIXED, PLAIN, timings[MIXED], last, length, wanted, left))
    return rows


def int8_against_stock(forced: Forced, settings: Settings, sessions: Sessions) -> list[Row]:
    """Batch 1, against stock PyTorch at full depth: the int8 file leaving at block M/2, and the plain int8 file, call
    after call as in a service, then the former once more right after a pass of the stock model, whose weights have
    driven its own out of the caches. `times_faster` is the quotient."""
    rows, last = [], forced.size.blocks
    early, plain, half = sessions.early(int8=True), sessions.plain(int8=True), max(2, last // 2)
    rounds = settings.rounds_of("int8-vs-stock")
    for length in settings.lengths:
        batch = forced.batch([half], length)
        stock = partial(forced.stock, **batch)
        call, whole = partial(early, **to_numpy(batch)), partial(plain, **to_numpy(batch))
        left = exits_of(call())
        with torch.inference_mode():
            calls = {HALF_WAY: call, PLAIN_INT8: whole}
            timings = against_base(stock, calls, rounds, settings.warmup, pause=_PAUSE, settle=True)
            timings |= against_base(stock, {HALF_WAY_COLD: call}, rounds, settings.warmup, pause=_PAUSE)
        for name, timing in timings.items():
            wanted, found = (None, None) if name == PLAIN_INT8 else ([half], left)
            row = make_row(name, STOCK, timing, last, length, wanted, found, whole=True)
            rows.append({**row, "times_faster": 1 / row["ratio"]})
    return rows


def to_numpy(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What BERT's tokenizer gives, [B, S] int64."""
    filled = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    return {name: value.numpy().astype(np.int64) for name, value in filled.items()}
