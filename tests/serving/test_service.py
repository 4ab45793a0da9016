"""The real service: `badge-peft serve` in a process of its own: asked, changed, a replica killed under load, shut
down."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")

from badge_peft import pipeline  # noqa: E402
from tests.serving.adapters import save_adapter  # noqa: E402
from tests.texts import sentences  # noqa: E402

pytestmark = pytest.mark.slow
TEXTS = [text for text, _ in sentences(30, seed=5)]
WAIT = 0.2  # seconds that each request waits for others: so long there is one that was accepted and not answered
TOKEN = {"Authorization": "Bearer of-the-test"}


class Running:
    """A service and a client of it."""

    def __init__(self, folder: Path) -> None:
        self.adapter = save_adapter(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.log = folder / "log"
        command = [sys.executable, "-m", "badge_peft.cli", "serve", str(self.adapter), "--port", port]
        options = ["--replicas", "2", "--threads", "1", "--max-rows", "20", "--max-body-bytes", "20000"]
        options += ["--shadow-share", "1", "--max-waiting", "25", "--batch-wait", str(1000 * WAIT)]
        environment = {**os.environ, "BADGE_PEFT_TOKEN": "of-the-test", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.wait_for(lambda: f"serving at http://127.0.0.1:{port}" in self.log.read_text())

    def wait_for(self, what, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.3)

    def predict(self, inputs, **more):
        return self.client.post("/predict", json={"inputs": inputs, **more})

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(240)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    service = Running(tmp_path_factory.mktemp("service"))
    yield service
    if service.process.poll() is None:
        service.process.kill()


def close(found, expected) -> bool:
    """Whether these are the answers to the texts, and not to others: scores of a random model tell texts apart."""
    return [(a["label"], a["exit_layer"]) for a in found] == [(a["label"], a["exit_layer"]) for a in expected] and [
        a["score"] for a in found
    ] == pytest.approx([a["score"] for a in expected], abs=1e-5)


def at_once(calls):
    """What these give, called together; an error of the connection is one of the results."""
    results: list = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except httpx.HTTPError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, results


def test_the_service_answers_changes_survives_and_stops(running):
    alone = pipeline(model=str(running.adapter))
    expected = alone(TEXTS[:9])

    # answers, those of the pipeline
    found = running.predict(TEXTS[:9])
    assert found.status_code == 200 and close(found.json(), expected), found.text
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
        (running.client.post("/rerank", json={"query": "x", "texts": ["y"]}), 400, "does not rank"),
        (running.client.put("/policy", json={}), 401, "bearer token"),
        (running.client.put("/policy", json={"early_exit": {"policy": "no"}}, headers=TOKEN), 400, "policy='no'"),
    ):
        assert answer.status_code == status and message in answer.text, (status, answer.text)

    # more than may wait is refused at once, and what was accepted is answered
    threads, results = at_once([lambda: running.predict(TEXTS[:20])] * 6)
    for thread in threads:
        thread.join()
    statuses = [answer.status_code for answer in results]
    assert {*statuses} == {200, 429}, statuses
    assert {answer.headers.get("Retry-After") for answer in results if answer.status_code == 429} == {"1"}

    # another setting, in force on both replicas when the change is answered
    running.wait_for(lambda: len(running.client.get("/info").json()["policy"]["replicas"]) == 2, 60)
    change = {"early_exit": {"policy": "fixed_depth", "depth": 2}}
    state = running.client.put("/policy", json=change, headers=TOKEN).json()
    assert len(state["replicas"]) == 2 and set(state["replicas"].values()) == {state["version"]}
    assert state["on_all_replicas"] is True
    at_two = alone(TEXTS, policy="fixed_depth", depth=2, threshold=None, patience=None)
    threads, results = at_once([lambda i=i: running.predict(TEXTS[i : i + 1]) for i in range(20)])
    for thread in threads:
        thread.join()
    assert all(close(answer.json(), at_two[i : i + 1]) for i, answer in enumerate(results))

    # what it says of itself
    assert running.client.get("/healthz").json() == {"status": "ok"}
    assert running.client.get("/info").json()["policy"]["early_exit"]["default"]["depth"] == 2
    assert "/predict" in running.client.get("/openapi.json").json()["paths"]
    assert running.client.get("/docs").status_code == 200

    def counted() -> bool:
        text = running.client.get("/metrics").text
        return 'badge_requests_total{status="413"}' in text and 'badge_shadow_rows{task="default"}' in text

    running.wait_for(counted, 30)

    # a replica is killed while both have requests: each is answered rightly or its client sees an error
    calls = [lambda i=i: running.predict(TEXTS[i : i + 2]) for i in range(24)]
    threads, results = at_once(calls)
    time.sleep(WAIT / 2)
    os.kill(int(next(iter(state["replicas"])).rpartition("-")[2]), signal.SIGKILL)
    for thread in threads:
        thread.join()
    for i, answer in enumerate(results):
        good = isinstance(answer, httpx.HTTPError) or answer.status_code in (429, 500, 503)
        assert good or close(answer.json(), at_two[i : i + 2]), answer
    running.wait_for(lambda: _answers(running, at_two))

    # it finishes what it accepted
    threads, results = at_once([lambda i=i: running.predict(TEXTS[i : i + 3]) for i in range(6)])
    time.sleep(WAIT / 2)
    code = running.stop()
    for thread in threads:
        thread.join()
    assert code == 0, running.log.read_text()[-3000:]
    assert all(close(answer.json(), at_two[i : i + 3]) for i, answer in enumerate(results)), results


def _answers(running: Running, expected) -> bool:
    try:
        again = running.predict(TEXTS[:9])
    except httpx.HTTPError:
        return False
    return again.status_code == 200 and close(again.json(), expected[:9])
