"""`Replica`: it answers at the setting that it was told, within its limits, and tells what it did."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from time import perf_counter, sleep

import pytest

anyio = pytest.importorskip("anyio", reason="the extra `serve` is not installed")
pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from badge_peft.early_exit.config import EarlyExitConfig  # noqa: E402
from badge_peft.serving.batching import Work  # noqa: E402
from badge_peft.serving.replica import Replica  # noqa: E402
from badge_peft.serving.report import Done  # noqa: E402
from badge_peft.serving.requests import RequestError, RerankRequest  # noqa: E402
from badge_peft.serving.settings import MAIN, Limits, ServiceSettings  # noqa: E402

pytestmark = pytest.mark.anyio
ROWS = [("a text", None), ("another", "pair")]


class Echo:
    """An engine that answers with the threshold it was called at, and waits where it is told to."""

    tasks: list[str] = []
    configs = {MAIN: EarlyExitConfig(threshold=0.1)}

    def unwatched(self, shadow_share):
        return {}

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.shadowed: list[tuple[str, str | None]] = []
        self.seconds = self.shadow_seconds = 0.0

    def predict(self, rows, configs, tasks=None, max_exit=None, all_scores=False):
        assert self.go.wait(10)
        return [{"text": text, "threshold": configs[MAIN].threshold, "exit_layer": 2} for text, _ in rows]

    def rerank(self, query, texts, top_k, config):
        return [{"index": 0, "score": config.threshold}], [2, 3, 3][: len(texts)]

    def shadow(self, task, rows, config):
        start = perf_counter()
        sleep(len(rows) * self.seconds)
        self.shadow_seconds += perf_counter() - start
        self.shadowed += rows
        return {"rows": len(rows)}


class Told:
    """A governor that says one setting and keeps what it hears."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.reports: list = []
        self.say(threshold, 1)

    def say(self, threshold: float, version: int) -> None:
        early_exit = {MAIN: EarlyExitConfig(threshold=threshold).to_dict()}
        self.state = {"version": version, "early_exit": early_exit, "report_every": 0.01, "ending": False}

    async def __call__(self, report):
        self.reports.append(report)
        return self.state


def make(**settings) -> tuple[Replica, Echo, Told]:
    engine, told = Echo(), Told()
    limits = Limits(rows=3, waiting_rows=3)
    return Replica("r", engine, ServiceSettings("x", limits=limits, **settings), told), engine, told


async def ask(replica: Replica, rows=ROWS):
    return await replica.predict(Work(list(rows)))


async def test_the_first_answer_is_at_the_setting_in_force_and_not_at_the_adapters_own():
    replica, _, _ = make()
    early = asyncio.ensure_future(ask(replica))
    await asyncio.sleep(0.01)
    assert not early.done()
    await replica.report()
    assert {answer["threshold"] for answer in await early} == {0.5}


async def test_what_was_done_is_told_once():
    replica, _, told = make()
    await replica.report()
    await ask(replica)
    for path, status in (("/predict", 200), ("/policy", 401), ("/predict", 200)):
        replica.count(path, status)
    with pytest.raises(RequestError, match="at least one"):
        await ask(replica, [])
    await replica.report()
    first, second = told.reports
    assert (first.version, second.version) == (0, 1)
    assert second.done.statuses == {("/predict", 200): 2, ("/policy", 401): 1}
    assert second.done.answered == {(MAIN, 2): 2}
    assert len(second.done.latencies) == 1 and second.done.measured == second.done.latencies
    assert (second.waiting, second.oldest) == (0, 0.0)
    await replica.report()
    assert told.reports[-1].done == Done()
    assert first.state is None and told.reports[-1].state is told.state


async def test_a_service_that_ends_finishes_what_it_has_accepted_and_takes_no_more():
    replica, engine, told = make()
    await replica.report()
    engine.go.clear()
    waits = asyncio.ensure_future(ask(replica))
    await asyncio.sleep(0.01)
    told.state = {**told.state, "ending": True, "version": 2}
    await replica.report()
    with pytest.raises(RequestError, match="is ending") as refused:
        await ask(replica)
    assert refused.value.status == 503
    engine.go.set()
    assert len(await waits) == 2


async def test_candidates_are_ranked_at_the_setting_in_force_and_their_exits_are_told():
    replica, _, told = make()
    await replica.report()
    assert await replica.rerank(RerankRequest(query="q", texts=["a", "b", "c"])) == [{"index": 0, "score": 0.5}]
    with pytest.raises(RequestError, match="send parts"):
        await replica.rerank(RerankRequest(query="q", texts=["a"] * 4))
    await replica.report()
    assert told.reports[-1].done.answered == {(MAIN, 2): 1, (MAIN, 3): 2}
    assert len(told.reports[-1].done.latencies) == 1


async def test_requests_that_wait_are_told_and_bound_what_is_accepted():
    replica, engine, told = make()
    await replica.report()
    engine.go.clear()
    waits = asyncio.ensure_future(ask(replica))
    await asyncio.sleep(0.02)
    with pytest.raises(RequestError, match="2 texts are waiting, and 3 may") as refused:
        await ask(replica)
    assert refused.value.status == 429 and refused.value.retry_after == 1
    await replica.report()
    assert told.reports[-1].waiting == 2 and 0.02 <= told.reports[-1].oldest < 5
    engine.go.set()
    assert len(await waits) == 2
    assert len(await ask(replica)) == 2  # there is room again


async def test_a_request_that_saw_two_settings_measures_neither():
    replica, engine, told = make()
    await replica.report()
    engine.go.clear()
    waits = asyncio.ensure_future(ask(replica))
    await asyncio.sleep(0.01)
    told.say(0.7, 2)
    await replica.report()
    engine.go.set()
    await waits
    assert {answer["threshold"] for answer in await ask(replica)} == {0.7}
    await replica.report()
    assert len(told.reports[-1].done.latencies) == 2 and len(told.reports[-1].done.measured) == 1


async def test_how_long_a_new_request_will_wait_follows_from_the_last_passes():
    replica, engine, told = make()
    await replica.report()
    assert told.reports[-1].expected == 0.0
    await ask(replica)
    engine.go.clear()
    waits = asyncio.ensure_future(ask(replica))
    await asyncio.sleep(0.01)
    await replica.report()
    assert told.reports[-1].expected == 2 / replica._speed > 0
    engine.go.set()
    await waits


async def test_what_a_client_has_bounded_says_nothing_of_the_setting():
    replica, _, told = make()
    await replica.report()
    await replica.predict(Work(list(ROWS), max_exit=1))
    await ask(replica)
    await replica.report()
    assert len(told.reports[-1].done.latencies) == 2 and len(told.reports[-1].done.measured) == 1


async def test_shadow_rows_run_though_others_always_wait_and_take_a_bounded_share_of_the_time():
    replica, engine, told = make(shadow_share=1.0, report_every=0.001)
    engine.seconds = 0.005
    await replica.report()
    load = [asyncio.ensure_future(keep_asking(replica)) for _ in range(2)]
    shadows = asyncio.ensure_future(replica.shadow_for_ever())
    start = perf_counter()
    while len(engine.shadowed) < 24 or perf_counter() - start < 1:
        assert perf_counter() - start < 60
        await asyncio.sleep(0.01)
    took = perf_counter() - start
    for task in (*load, shadows):
        task.cancel()
    await replica.report()
    assert engine.shadow_seconds < 0.06 * took + 0.1  # a run has just begun
    assert sum(said["rows"] for _, said in told.reports[-1].done.shadows) >= 24


async def keep_asking(replica):
    while True:
        await ask(replica, ROWS[:1])


async def test_any_row_since_the_last_shadow_run_is_as_likely_to_be_in_the_next():
    found: Counter = Counter()
    for seed in range(400):
        replica, engine, _ = make(shadow_share=1.0)
        replica._draw.seed(seed)
        await replica.report()
        for i in range(20):
            await ask(replica, [(f"text {i}", None), (f"text {20 + i}", None)])
        await replica.run_shadows()
        assert len(set(engine.shadowed)) == 8
        found.update(int(text.split()[1]) for text, _ in engine.shadowed)
    assert len(found) == 40 and max(found.values()) < 2 * min(found.values())  # 80 in the mean, 8 deviation


async def test_a_shadow_run_that_fails_is_not_the_last(caplog):
    with anyio.fail_after(30):
        replica, engine, _ = make(shadow_share=1.0, report_every=0.001)
        await replica.report()
        whole, engine.shadow = engine.shadow, None
        task = asyncio.ensure_future(replica.shadow_for_ever())
        await ask(replica)
        while "a shadow run has failed" not in caplog.text:
            await asyncio.sleep(0.001)
        engine.shadow = whole
        while not engine.shadowed:
            await ask(replica)
        task.cancel()


async def test_a_report_that_fails_is_not_the_last(caplog):
    replica, _, told = make(report_every=0.01)
    tell, replica._tell = replica._tell, None
    task = asyncio.ensure_future(replica.report_for_ever())
    await asyncio.sleep(0.03)
    replica._tell = tell
    await asyncio.sleep(0.05)
    task.cancel()
    assert told.reports and "a report has failed" in caplog.text


async def test_what_a_failed_report_said_is_in_the_next():
    replica, _, told = make(shadow_share=1.0)
    await replica.report()
    await ask(replica)
    replica.count("/predict", 200)
    tell, replica._tell = replica._tell, None
    for _ in range(2):
        with pytest.raises(TypeError):
            await replica.report()
        await ask(replica, ROWS[:1])
        replica.count("/predict", 200)
        await replica.run_shadows()
    replica._tell = tell
    await replica.report()
    found = told.reports[-1].done
    assert found.statuses == {("/predict", 200): 3} and found.answered == {(MAIN, 2): 4}
    assert len(found.latencies) == len(found.measured) == 3
    assert sum(said["rows"] for _, said in found.shadows) == 4


async def test_the_oldest_request_is_the_first_that_is_left():
    replica, engine, told = make()
    await replica.report()
    engine.go.clear()
    first = asyncio.ensure_future(ask(replica, ROWS[:1]))
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(ask(replica))
    await asyncio.sleep(0.01)
    await replica.report()
    assert told.reports[-1].waiting == 3 and told.reports[-1].oldest > 0.05
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await replica.report()
    assert told.reports[-1].waiting == 2 and told.reports[-1].oldest < told.reports[-2].oldest
    engine.go.set()
    await second
    await replica.report()
    assert (told.reports[-1].waiting, told.reports[-1].oldest) == (0, 0.0)


async def test_what_nobody_watches_does_not_run_twice(monkeypatch):
    replica, engine, _ = make(shadow_share=1.0)
    await replica.report()
    await replica.predict(Work(list(ROWS), max_exit=1))  # a bound of its own
    await replica.run_shadows()
    assert engine.shadowed == []
    monkeypatch.setattr(Echo, "unwatched", lambda self, share: {MAIN: "the file has no full depth"})
    replica, engine, _ = make(shadow_share=1.0)
    await replica.report()
    await ask(replica)
    await replica.run_shadows()
    assert engine.shadowed == []
