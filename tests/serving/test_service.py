"""The real service: `badge-peft serve` in a process of its own: asked, changed, a replica killed, shut down."""

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
        options = ["--threads", "1", "--max-rows", "20", "--max-body-bytes", "20000", "--shadow-share", "1"]
        environment = {**os.environ, "BADGE_PEFT_TOKEN": "of-the-test", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.wait_for(lambda: "serving at" in self.log.read_text())

    def wait_for(self, what, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.3)

    def predict(self, inputs, **more):
        return self.client.post("/predict", json={"inputs": inputs, **more})

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    service = Running(tmp_path_factory.mktemp("service"))
    yield service
    if service.process.poll() is None:
        service.process.kill()


def test_the_service_answers_changes_survives_and_stops(running):
    alone = pipeline(model=str(running.adapter))

    # answers, those of the pipeline
    found = running.predict(TEXTS[:9])
    expected = alone(TEXTS[:9])
    assert found.status_code == 200, found.text
    assert [(a["label"], a["exit_layer"]) for a in found.json()] == [(a["label"], a["exit_layer"]) for a in expected]
    assert [a["score"] for a in found.json()] == pytest.approx([a["score"] for a in expected], abs=1e-5)
    assert max(a["exit_layer"] for a in running.predict(TEXTS[:9], max_exit=1).json()) == 1
    assert len(running.predict([["a film", "a plot"]]).json()) == 1

    # errors, with the remedy
    for answer, status, message in (
        (running.predict([]), 422, "at least one"),
        (running.predict(TEXTS[:1] * 21), 413, "send parts"),
        (running.predict("x" * 30_000), 413, "20000 bytes"),
        (running.predict("x", tasks=["y"]), 400, "leave `tasks` out"),
        (running.client.post("/predict", json={"input": "x"}), 422, "inputs"),
        (running.client.post("/rerank", json={"query": "x", "texts": ["y"]}), 400, "does not rank"),
        (running.client.put("/policy", json={}), 401, "bearer token"),
        (running.client.put("/policy", json={"early_exit": {"policy": "no"}}, headers=TOKEN), 400, "policy='no'"),
    ):
        assert answer.status_code == status and message in answer.text, (status, answer.text)

    # another setting, in force when the change is answered
    change = {"early_exit": {"policy": "fixed_depth", "depth": 2}}
    state = running.client.put("/policy", json=change, headers=TOKEN).json()
    assert set(state["replicas"].values()) == {state["version"]}
    assert {a["exit_layer"] for a in running.predict(TEXTS[:9]).json()} == {2}

    # what it says of itself
    assert running.client.get("/healthz").json() == {"status": "ok"}
    assert running.client.get("/info").json()["policy"]["early_exit"]["default"]["depth"] == 2
    assert "/predict" in running.client.get("/openapi.json").json()["paths"]
    assert running.client.get("/docs").status_code == 200

    def counted() -> bool:
        text = running.client.get("/metrics").text
        return 'badge_requests_total{status="413"}' in text and 'badge_shadow_rows{task="default"}' in text

    running.wait_for(counted, 30)

    # the replica is killed: errors while there is none, then the same answers at the same setting
    (replica,) = state["replicas"]
    os.kill(int(replica.rpartition("-")[2]), signal.SIGKILL)

    def answers() -> bool:
        try:
            again = running.predict(TEXTS[:9])
        except httpx.HTTPError:
            return False
        return again.status_code == 200 and {a["exit_layer"] for a in again.json()} == {2}

    running.wait_for(answers)

    # it finishes what it accepted
    results: list[object] = []

    def ask(i: int) -> None:
        try:
            results.append(running.predict(TEXTS[i : i + 15]).status_code)
        except httpx.HTTPError as error:
            results.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    code = running.stop()
    for thread in threads:
        thread.join()
    assert code == 0, running.log.read_text()[-3000:]
    assert all(status in (200, 404, 503) or isinstance(status, httpx.ConnectError) for status in results), results
