"""Nothing of a call outlives it: no objects, no graph, and no input costs more than full depth."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref

import pytest
import torch

from tests.models import make_badge, make_batch, make_labels

from .growth import TRACED, grow
from .requests import answer, draw_requests, make_service


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
    monkeypatch.setattr("tests.reliability.growth.answer", lambda *args: kept.append(answer(*args)))
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
