"""Each actor of a started service is killed under load: what clients get meanwhile, and how long it lasts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import psutil
import pytest

pytest.importorskip("ray", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")

from badge_peft import pipeline  # noqa: E402
from tests.serving.adapters import close, save_adapter  # noqa: E402
from tests.serving.running import Running  # noqa: E402
from tests.texts import sentences  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # two minutes of two cores
TEXTS = [text for text, _ in sentences(8, seed=5)]
CLIENTS = 4


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def running(adapter, tmp_path_factory):
    service = Running(tmp_path_factory.mktemp("service"), str(adapter), "--replicas", "2", "--threads", "1")
    yield service
    service.kill()


class Load:
    """Clients that ask until they are stopped. Each answer is right, or an error of the server's.

    Attributes:
        ends: For each request when it ended, and its status (a name for an error of the connection).
        wrong: Answers that belong to another text or another setting.
    """

    def __init__(self, running: Running, expected: list) -> None:
        self.ends: list[tuple[float, int | str]] = []
        self.wrong: list = []
        self._stop, self._expected = threading.Event(), expected
        self._threads = [threading.Thread(target=self._ask, args=(running, i)) for i in range(CLIENTS)]

    def _ask(self, running: Running, i: int) -> None:
        with httpx.Client(base_url=running.client.base_url, timeout=60) as client:
            while not self._stop.is_set():
                i = (i + 1) % len(TEXTS)
                try:
                    answer = client.post("/predict", json={"inputs": TEXTS[i]})
                    if answer.status_code == 200 and not close(answer.json(), self._expected[i : i + 1]):
                        self.wrong.append((TEXTS[i], answer.text))
                    self.ends.append((time.monotonic(), answer.status_code))
                except httpx.HTTPError as error:
                    self.ends.append((time.monotonic(), type(error).__name__))
                    self._stop.wait(0.05)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def process_of(running: Running, name: str) -> psutil.Process:
    found = psutil.Process(running.process.pid).children(recursive=True)
    return next(process for process in found if name in " ".join(process.cmdline()))


@pytest.mark.parametrize("name", ["ServeReplica", "Governing", "ServeController", "ProxyActor"])
def test_an_actor_that_is_killed_under_load_comes_back_and_nothing_is_lost(running, adapter, name, capsys):
    depth = 2 if name == "ServeReplica" else 1  # another setting than the one before
    running.wait_for(lambda: len(info(running).get("replicas", ())) == 2)
    state = running.change(early_exit={"policy": "fixed_depth", "depth": depth}).json()
    assert state["on_all_replicas"] is True
    expected = pipeline(model=str(adapter))(TEXTS, policy="fixed_depth", depth=depth, threshold=None, patience=None)
    victim, said = process_of(running, name), Counter()
    with Load(running, expected) as load:
        running.wait_for(lambda: len(load.ends) > 50)
        killed = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)

        def back() -> bool:
            with_policy = None
            try:
                with_policy = running.client.get("/info")
                said[with_policy.status_code] += 1
            except httpx.HTTPError as error:
                said[type(error).__name__] += 1
            good = [end for end, status in load.ends if status == 200 and end > killed]
            try:
                there = process_of(running, name).pid != victim.pid
            except (StopIteration, psutil.NoSuchProcess):
                return False
            return there and len(good) > 50 and with_policy is not None and with_policy.status_code == 200

        running.wait_for(back)
        running.wait_for(lambda: len(info(running).get("replicas", ())) == 2)
    after = Counter(status for end, status in load.ends if end > killed)
    bad = [end for end, status in load.ends if end > killed and status != 200]
    with capsys.disabled():
        last = max(bad, default=killed) - killed
        print(f"\n{name}: {dict(after)}, the last error after {last:.1f} s; /info {dict(said)}")
    assert load.wrong == []
    assert info(running)["early_exit"]["default"]["depth"] == depth  # the setting that was acknowledged
    errors = {status for status in after if status != 200}
    if name in ("Governing", "ServeController"):  # no request needs them
        assert errors == set()
    elif name == "ServeReplica":
        assert errors <= {500, 503}
    else:
        assert not any(isinstance(status, int) for status in errors)
    if name != "ServeReplica":
        assert 500 not in said


def info(running: Running) -> dict:
    try:
        answer = running.client.get("/info")
    except httpx.HTTPError:
        return {}
    return answer.json()["policy"] if answer.status_code == 200 else {}
