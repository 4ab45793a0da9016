"""One model, many callers (threads, tasks of an event loop, forked processes, calls inside of calls, calls that end in
an exception): every answer is that of the same call made alone. `nox -s reliability` asks for more.

The functions give how many answers differ from those of the same calls made one after another."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from .requests import Request, answer, differences, draw_requests, make_service

REQUESTS = int(os.environ.get("BADGE_PEFT_REQUESTS", "60"))
THREADS = 8


def one_by_one(model: Any, requests: Sequence[Request]) -> list[Any]:
    """The answers that all others are compared with."""
    return [answer(model, request) for request in requests]


def threads(count: int, seed: int = 0, case: str = "bert") -> int:
    """`count` requests from eight threads, which the interpreter switches a hundred times as often as usual."""
    model, requests = make_service(case), draw_requests(count, seed)
    expected = one_by_one(model, requests)
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            answers = list(pool.map(lambda request: answer(model, request), requests))
    finally:
        sys.setswitchinterval(before)
    return differences(answers, expected)


def event_loop(count: int, seed: int = 1) -> int:
    """`count` requests as tasks of one event loop, each handed to a thread of the loop's pool."""
    model, requests = make_service(), draw_requests(count, seed)
    expected = one_by_one(model, requests)

    async def serve() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(answer, model, request) for request in requests))

    return differences(asyncio.run(serve()), expected)


class _Answers(Dataset[Any]):
    def __init__(self, model: Any, requests: Sequence[Request]) -> None:
        self.model, self.requests = model, requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> Any:
        return answer(self.model, self.requests[index])


def forked(count: int, seed: int = 2, workers: int = 2) -> int:
    """`count` requests in worker processes that were forked when the model was there and had answered."""
    model, requests = make_service(), draw_requests(count, seed)
    expected = one_by_one(model, requests)
    loader = DataLoader(
        _Answers(model, requests), batch_size=None, num_workers=workers, multiprocessing_context="fork"
    )
    return differences(list(loader), expected)


def nested(count: int, seed: int = 3) -> int:
    """`count` requests, during each of which another one is made from inside of a block: both must come out right."""
    model, requests = make_service(), draw_requests(count, seed)
    expected = one_by_one(model, requests)
    inner: list[Any] = []
    waiting = [False]

    def hook(*_: Any) -> None:
        if waiting[0]:
            waiting[0] = False
            inner.append(answer(model, requests[len(inner)]))

    handle = model.base_model.wrapped[1].base_layer.register_forward_pre_hook(hook)
    outer, wanted = [], []
    for request, answered in zip(reversed(requests), reversed(expected), strict=True):
        waiting[0] = len(inner) < len(requests)
        outer.append(answer(model, request))
        wanted.append(answered)
    handle.remove()
    # a call whose rows all stop before block 2 does not come to the hook
    return differences(outer, wanted) + differences(inner, expected[: len(inner)]) + (len(inner) < count // 2)


def interrupted(count: int, seed: int = 4) -> int:
    """`count` times an exception, or Ctrl-C, in mid-forward, and the next request right after it."""
    model, requests = make_service(), draw_requests(count, seed)
    expected = one_by_one(model, requests)
    draw = random.Random(seed)
    wrong = 0
    for request, wanted in zip(requests, expected, strict=True):
        kind = draw.choice((KeyboardInterrupt, RuntimeError, SystemExit))

        def hook(*_: Any, kind: type[BaseException] = kind) -> None:
            raise kind

        block = draw.choice(model.base_model.wrapped[:2]).base_layer
        place = draw.choice([m for m in block.modules() if isinstance(m, (torch.nn.Linear, torch.nn.LayerNorm))])
        handle = place.register_forward_hook(hook)
        try:
            answer(model, draw.choice(requests))
        except kind:
            pass
        finally:
            handle.remove()
        wrong += differences([answer(model, request)], [wanted])
    return wrong


def test_requests_differ():
    """The comparison can fail: the answers of other requests are not these."""
    model, requests = make_service(), draw_requests(40)
    answers = one_by_one(model, requests)
    assert differences(answers, answers) == 0
    assert differences(answers, answers[1:] + answers[:1]) > 30
    exits = [exits for _, exits in answers if exits is not None]
    assert len({int(layer) for found in exits for layer in found}) > 2
    assert differences([answer(model, requests[0])], answers[:1]) == 0


@pytest.mark.parametrize("callers", [threads, event_loop, nested, interrupted])
def test_answers_are_those_of_calls_made_alone(callers):
    assert callers(REQUESTS) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_forked_workers():
    assert forked(REQUESTS // 2) == 0


@pytest.mark.parametrize("case", ["albert", "deberta-v2"])
def test_threads_share_blocks_that_run_again_and_tensors_of_all_rows(case):
    assert threads(REQUESTS // 2, case=case) == 0
