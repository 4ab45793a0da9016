"""`badge-peft serve` in a process of its own, and a client of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

TOKEN = {"Authorization": "Bearer of-the-test"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    """A service.

    Args:
        folder: It runs in, with its log.
        adapter: What follows `badge-peft serve`.
        options: What follows that.
        port: To listen at.
        environment: Of the process, beside this one's.
    """

    def __init__(self, folder: Path, adapter: str, *options: str, port: int | None = None, **environment: str) -> None:
        port = port or free_port()
        self.log = folder / f"log-{port}-{time.monotonic()}"
        command = [sys.executable, "-m", "badge_peft.cli", "serve", adapter, "--port", str(port), *options]
        whole = {**os.environ, "BADGE_PEFT_TOKEN": "of-the-test", "OMP_NUM_THREADS": "1", **environment}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=whole, cwd=folder)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        try:
            self.wait_for(lambda: f"serving at http://127.0.0.1:{port}" in self.log.read_text())
        except BaseException:  # nobody else knows of the process
            self.kill()
            raise

    def wait_for(self, what: Callable[[], bool], seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.3)

    def predict(self, inputs: Any, **more: Any) -> httpx.Response:
        return self.client.post("/predict", json={"inputs": inputs, **more})

    def change(self, **policy: Any) -> httpx.Response:
        return self.client.put("/policy", json=policy, headers=TOKEN)

    def info(self) -> dict[str, Any]:
        return self.client.get("/info").json()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(240)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()


def at_once(calls: Sequence[Callable[[], Any]]) -> tuple[list[threading.Thread], list[Any]]:
    """What these give, called together; an error of the connection is one of the results."""
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except httpx.HTTPError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, results


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The same, once all have come back."""
    threads, results = at_once(calls)
    for thread in threads:
        thread.join()
    return results
