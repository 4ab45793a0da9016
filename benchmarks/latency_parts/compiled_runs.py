"""One cell of `compiled.py`: what compiled blocks save, on one model, batch size and length."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import badge_peft
from badge_peft.evaluation.timing import Runner, take_turns
from latency_parts.forced import Forced, exits_of, shared_copy

STOCK, BLOCKS, WHOLE = "stock, eager", "stock, each block compiled", "stock, compiled as a whole"
OUTSIDE = "stock without its blocks, eager"
EAGER, COMPILED = "leaves at block {}, eager", "leaves at block {}, compile_blocks"


def has_compiler() -> bool:
    """Whether inductor has the C++ compiler that it needs."""
    return any(shutil.which(name) for name in ("g++", "clang++"))


def measure_cell(
    forced: Forced, rows: int, length: int, exits: Sequence[int], rounds: int, warmup: int, backend: str = "inductor"
) -> dict[str, Any]:
    """Compiles everything anew for one shape, and times it in turns.

    The stock model is compiled in two ways: block by block, as `compile_blocks` does it, and as a whole, which early
    exits cannot be; both for this shape alone.

    Args:
        forced: Stock model and model with exits, of the same weights.
        rows: B; all leave at the same block.
        length: S.
        exits: The blocks at which they leave.
        rounds: How often everything takes its turn.
        warmup: Rounds before the first that counts.
        backend: As `torch.compile` has it; another one than inductor tries the benchmark, and says nothing.

    Returns:
        `seconds` name -> [rounds], `first_call_s` name -> seconds of the call that compiles, `as_forced` whether all
        rows left where they should, compiled or not, and `max_difference` of the logits from those of the eager ones.
    """
    torch._dynamo.reset()
    blocks, whole, model = (shared_copy(x) for x in (forced.stock, forced.stock, forced.model))
    for layer in blocks.bert.encoder.layer:
        layer.compile(dynamic=False, backend=backend)
    whole.compile(dynamic=False, backend=backend)
    badge_peft.compile_blocks(model, buckets=[length], backend=backend)

    full = forced.batch([forced.size.blocks] * rows, length)
    stock = {STOCK: forced.stock, BLOCKS: blocks, WHOLE: whole, OUTSIDE: forced.outside}
    calls: dict[str, Callable[[], Any]] = {name: partial(x, **full) for name, x in stock.items()}
    for k in exits:
        batch = forced.batch([k] * rows, length, seed=k)
        calls[EAGER.format(k)] = partial(forced.model.early_exit_forward, **batch)
        calls[COMPILED.format(k)] = partial(model.early_exit_forward, **batch)

    with torch.inference_mode():
        outputs, first = {}, {}
        for name, call in calls.items():
            start = time.perf_counter()
            outputs[name] = call()
            first[name] = round(time.perf_counter() - start, 3)
        pairs = [(BLOCKS, STOCK), (WHOLE, STOCK), *((COMPILED.format(k), EAGER.format(k)) for k in exits)]
        difference = max(float((outputs[a].logits - outputs[b].logits).abs().max()) for a, b in pairs)
        left = [exits_of(outputs[kind.format(k)]) == [k] * rows for k in exits for kind in (EAGER, COMPILED)]
        runners = [Runner(lambda _, call=call: call(), read=_nothing) for call in calls.values()]
        timed = take_turns(runners, [None], rounds, warmup=[None] * warmup)
    return {
        "seconds": {name: [round(s, 7) for s in x.seconds] for name, x in zip(calls, timed, strict=True)},
        "first_call_s": first,
        "as_forced": all(left),
        "max_difference": difference,
        "rounds": rounds,
        "blocks": forced.size.blocks,
        "exits": list(exits),
    }


def _nothing(output: Any) -> None:
    """Keeps nothing of what was computed."""
