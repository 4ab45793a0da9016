"""The services that are measured, each in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil

TOKEN = "of-the-benchmark"


class Running:
    """A service, `badge-peft serve` or the empty deployment: what follows `python` (the port is added), a file for its
    output, and an environment beside that of this process."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {
            "RAY_worker_niceness": "0",
            **os.environ,
            **(environment or {}),
            "BADGE_PEFT_TOKEN": TOKEN,
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command, "--port", str(port)], stdout=file, stderr=file, env=own
            )
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> Running:
        end = time.monotonic() + 300
        while f"serving at {self.url}" not in self.log.read_text():  # a traceback has the line of the code
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the service has not started: {self.log.read_text()[-2000:]}")
            time.sleep(0.3)
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(120)

    @cached_property
    def processes(self) -> list[psutil.Process]:
        """All that belong to it, when this is asked for first."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def change(self, **policy: Any) -> dict[str, Any]:
        """`PUT /policy`."""
        answer = self.client.put("/policy", json=policy, headers={"Authorization": f"Bearer {TOKEN}"})
        return answer.raise_for_status().json()

    def replicas(self) -> dict[str, int]:
        """Process numbers of the replicas, by name."""
        names = self.client.get("/info").raise_for_status().json()["policy"]["replicas"]
        return {name: int(name.rpartition("-")[2]) for name in names}

    def cpu_seconds(self) -> float:
        """What the replicas have used of the processor."""
        found = 0.0
        for number in self.replicas().values():
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return found


def serve_command(adapter: str, *options: str) -> list[str]:
    """`badge-peft serve`."""
    return ["-m", "badge_peft.cli", "serve", adapter, *options]
