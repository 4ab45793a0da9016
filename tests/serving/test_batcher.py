"""`Batcher`: requests that wait while a pass runs share the next, each gets its own result, and a failure is told."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("anyio", reason="the extra `serve` is not installed")
pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from badge_peft.serving.batching import Batcher, Work  # noqa: E402

pytestmark = pytest.mark.anyio


class Model:
    """Answers with the texts, once it is let go; it keeps what came together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()

    async def __call__(self, works):
        self.batches.append([len(work.rows) for work in works])
        await self.go.wait()
        if any(text == "bad" for work in works for text, _ in work.rows):
            raise RuntimeError("of the whole batch")
        return [ValueError("alone") if work.rows[0][0] == "odd" else [t for t, _ in work.rows] for work in works]


def work(*texts: str) -> Work:
    return Work([(text, None) for text in texts])


async def test_the_first_goes_at_once_and_those_that_wait_go_together():
    model = Model()
    batcher = Batcher(model, rows=4)
    first = asyncio.ensure_future(batcher(work("a")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert model.batches == [[1]]
    others = [asyncio.ensure_future(batcher(work(f"{i}", f"{i}'"))) for i in range(3)]
    await asyncio.sleep(0.01)
    model.go.set()
    assert await first == ["a"]
    assert await asyncio.gather(*others) == [[f"{i}", f"{i}'"] for i in range(3)]
    assert model.batches == [[1], [2, 2], [2]]  # four rows are full
    assert await batcher(work("again")) == ["again"]


async def test_a_request_larger_than_a_batch_is_one():
    model = Model()
    model.go.set()
    batcher = Batcher(model, rows=2)
    small, large = batcher(work("a")), batcher(work(*"bcdef"))
    assert await asyncio.gather(small, large) == [["a"], [*"bcdef"]]
    assert model.batches == [[1], [5]]


async def test_it_waits_for_others_where_it_is_told_to():
    model = Model()
    model.go.set()
    batcher = Batcher(model, rows=4, wait=0.05)
    first = asyncio.ensure_future(batcher(work("a")))
    await asyncio.sleep(0.01)
    assert model.batches == []
    assert await asyncio.gather(first, batcher(work("b"))) == [["a"], ["b"]]
    assert model.batches == [[1, 1]]


async def test_failures_reach_those_who_asked_and_no_others():
    model = Model()
    model.go.set()
    batcher = Batcher(model, rows=4)
    found = await asyncio.gather(batcher(work("odd")), batcher(work("a")), return_exceptions=True)
    assert isinstance(found[0], ValueError) and found[1] == ["a"]
    found = await asyncio.gather(batcher(work("bad")), batcher(work("a")), return_exceptions=True)
    assert [str(error) for error in found] == ["of the whole batch"] * 2
    assert await batcher(work("after")) == ["after"]


async def test_a_client_that_has_gone_is_not_answered():
    model = Model()
    batcher = Batcher(model, rows=4)
    running = asyncio.ensure_future(batcher(work("a")))
    await asyncio.sleep(0.01)
    gone, stays = (asyncio.ensure_future(batcher(work(text))) for text in ("b", "c"))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.sleep(0.01)
    model.go.set()
    assert await running == ["a"] and await stays == ["c"]
    assert model.batches == [[1], [1]]
