"""Experiments in PyTorch: what exits cost when nobody leaves, and what leaving saves, alone and in batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from latency_parts.forced import NOBODY, RULE, Forced, exits_of, spread
from latency_parts.rows import Row, make_row
from latency_parts.settings import Settings
from latency_parts.turns import against_base

STOCK = "stock PyTorch"
ALL_EXITS = "full depth, all exits"
NONE_TAKEN = "early exit, nobody leaves"
DGE = "leaves by DGE"
FIXED = "leaves at a fixed depth"
MIXED = "each row leaves on its own"
TOGETHER = "the batch leaves together"


def full_depth(forced: Forced, settings: Settings, device: str) -> list[Row]:
    """Batch 1: every exit is computed and nobody leaves."""
    rows, last = [], forced.size.blocks
    for length in settings.lengths:
        batch = _on(forced.batch([last], length), device)
        early = partial(forced.model.early_exit_forward, **batch, **NOBODY)
        calls = {ALL_EXITS: partial(forced.model, **batch), NONE_TAKEN: early}
        with torch.inference_mode():
            left = exits_of(early())
            timings = _turns(forced, batch, calls, settings, "full-depth", device)
        for name, measured in ((ALL_EXITS, None), (NONE_TAKEN, left)):
            rows.append(make_row(name, STOCK, timings[name], last, length, [last], measured, whole=True))
    return rows


def exits(forced: Forced, settings: Settings, device: str) -> list[Row]:
    """Batch 1: a row leaves at block k, by DGE (from block 2 on) and by `fixed_depth`."""
    rows, last = [], forced.size.blocks
    for length in settings.lengths:
        calls: dict[str, Callable[[], Any]] = {}
        wanted: dict[str, tuple[str, int]] = {}
        for k in range(1, last + 1):
            batch = _on(forced.batch([max(k, 2)], length, seed=k), device)
            at_k = {"policy": "fixed_depth", "depth": k, "threshold": None, "patience": None}
            for name, rule in ((DGE, RULE), (FIXED, at_k)):
                if name == FIXED or k > 1:
                    calls[f"{name} {k}"] = partial(forced.model.early_exit_forward, **batch, **rule)
                    wanted[f"{name} {k}"] = (name, k)
        whole = _on(forced.batch([last], length), device)
        with torch.inference_mode():
            left = {name: exits_of(call()) for name, call in calls.items()}
            timings = _turns(forced, whole, calls, settings, "exits", device)
        for name, (variant, k) in wanted.items():
            rows.append(make_row(variant, STOCK, timings[name], last, length, [k], left[name]))
    return rows


def batches(forced: Forced, settings: Settings, device: str) -> list[Row]:
    """Rows of a batch leave at blocks 2 to M. Beside it what libraries do that stop when the whole batch agrees: the
    same model, all rows until the last one leaves."""
    rows, last = [], forced.size.blocks
    for count, length in settings.batches:
        wanted = spread(count, last)
        batch = _on(forced.batch(wanted, length), device)
        together = {"policy": "fixed_depth", "depth": max(wanted), "threshold": None, "patience": None}
        calls = {
            MIXED: partial(forced.model.early_exit_forward, **batch, **RULE),
            TOGETHER: partial(forced.model.early_exit_forward, **batch, **together),
        }
        with torch.inference_mode():
            left = exits_of(calls[MIXED]())
            timings = _turns(forced, batch, calls, settings, "batch", device)
        for name in calls:  # the rows need the same mean depth, whoever waits for whom
            rows.append(make_row(name, STOCK, timings[name], last, length, wanted, left))
    return rows


def _turns(
    forced: Forced, batch: dict[str, Any], calls: dict[str, Any], settings: Settings, experiment: str, device: str
) -> dict[str, Any]:
    stock, outside = partial(forced.stock, **batch), partial(forced.outside, **batch)
    rounds = settings.rounds_of(experiment)
    return against_base(stock, calls, rounds, settings.warmup, device, outside=outside)


def _on(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
