"""Nothing of a call outlives it: no objects, no graph, and no input costs more than full depth."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import make_badge, make_batch, make_labels

from .requests import Request, answer, draw_requests, make_service

TRACED = 2000  # calls of which Python's memory is traced, which takes five times as long
DIFFERENT = 40  # requests, made again and again: after two rounds the caches of torch and of policies are full


@dataclass(frozen=True)
class Growth:
    """From the end of the warm-up to the end.

    Args:
        calls: How many there were.
        objects: That Python's garbage collector knows, more than before.
        traced: Bytes of Python's own memory, of `TRACED` more calls at most.
        resident: Bytes of the process, tensors included; 0 where the system does not say.
    """

    calls: int
    objects: int
    traced: int
    resident: int


def grow(calls: int, seed: int = 5) -> Growth:
    """Makes `calls` mixed calls: early exit, full depth, adapters by row."""
    model, waiting = make_service(), cycle(draw_requests(DIFFERENT, seed))
    _serve(model, waiting, 2 * DIFFERENT)
    before = _measure()
    _serve(model, waiting, calls)
    after = _measure()
    tracemalloc.start()
    _serve(model, waiting, DIFFERENT)
    first = _traced()
    _serve(model, waiting, min(calls, TRACED))
    last = _traced()
    tracemalloc.stop()
    return Growth(calls, after[0] - before[0], last - first, after[1] - before[1])


def _serve(model: Any, requests: Iterator[Request], calls: int) -> None:
    for _ in range(calls):
        answer(model, next(requests))


def _measure() -> Sequence[int]:
    gc.collect()
    return len(gc.get_objects()), _resident()


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def _resident() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))


def test_calls_leave_nothing_behind():
    calls = int(os.environ.get("BADGE_PEFT_CALLS", "120"))
    growth = grow(calls)
    assert growth.objects < 20  # one object a call would be 120
    # of the first calls some is kept for the next (76 kB after 500, 117 kB after 4,000), but no 60 bytes of each
    assert growth.traced < max(80_000, 60 * min(calls, TRACED))
    # memory that was never used before comes in by pages in the first thousands of calls
    assert growth.resident < 50_000_000
    print(growth)


def test_growth_would_be_seen(monkeypatch):
    """The measurement can fail: one kept answer a call is seen."""
    kept = []
    monkeypatch.setattr(f"{__name__}.answer", lambda *args, answer=answer: kept.append(answer(*args)))
    assert grow(40).objects >= 40


@pytest.mark.parametrize("fields", [{}, {"exit_type": "past_future", "final_exit": "exit"}, {"learn_to_exit": True}])
def test_no_graph_outlives_its_output(fields):
    model, batch = make_badge("bert", **fields), {**make_batch(), "labels": make_labels()}
    model.train()
    before = len(pickle.dumps(model.state_dict()))
    out = model(**batch)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # while the graph lives
    assert len(pickle.dumps(model.state_dict())) == before
    assert not any(tensor.grad_fn for tensor in model.state_dict().values())
    graph = weakref.ref(out.loss)
    out.loss.backward()
    del out
    gc.collect()
    assert graph() is None
    for twin in copies:
        assert all(p.grad is None and p.is_leaf for p in twin.parameters())
        with torch.no_grad():
            assert torch.equal(twin.eval()(**batch).exit_logits, model.eval()(**batch).exit_logits)


def test_an_input_that_never_exits_runs_every_block_once():
    """What it costs beyond full depth is measured: docs/results/speed.md, "nobody leaves"."""
    model = make_service()
    runs = [0]
    for block in model.base_model.wrapped:
        block.base_layer.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    for request in [r for r in draw_requests(40) if not r.full_depth and "adapter_names" not in r.arguments]:
        runs[0] = 0
        out = model.early_exit_forward(**request.batch, **{**request.arguments, "policy": "never"})
        assert runs[0] == 4 and set(out.exit_layer.tolist()) == {4}
        answer(model, request)
        assert runs[0] <= 8
