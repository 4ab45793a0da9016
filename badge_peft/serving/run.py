"""Starts a service on Ray Serve, and ends it: what was accepted is answered first."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from badge_peft.serving.deployment import Service
from badge_peft.serving.settings import ServiceSettings

TOKEN = "BADGE_PEFT_TOKEN"  # an environment variable
APPLICATION = "badge-peft"


def check_port(host: str, port: int) -> None:
    """Refuses a port that is in use, before anything is started.

    Raises:
        OSError: it cannot be listened at.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen at {host}:{port} ({error}): choose another --port or --host.") from error


def run_service(
    settings: ServiceSettings,
    host: str,
    port: int,
    address: str | None = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serves until a signal (INT or TERM) comes, and then finishes what was accepted.

    Args:
        settings: What to serve.
        host: To listen at.
        port: To listen at.
        address: Of a Ray cluster; None starts one here, for this service alone.
        ready: Called once requests are answered.
    """
    stop = threading.Event()
    if address is None:
        check_port(host, port)
    cores = settings.replicas * settings.threads + 1  # what Ray counts, so that it never waits for a machine
    own: dict[str, Any] = {} if address else {"num_cpus": max(cores, os.cpu_count() or 1), "include_dashboard": False}
    ray.init(address=address, namespace="serve", **own)
    try:
        serve.start(http_options={"host": host, "port": port})
        deployed = Service.options(  # type: ignore[attr-defined]
            num_replicas=settings.replicas,
            max_ongoing_requests=settings.limits.waiting_rows + 100,  # more than are accepted: those get a 429
            ray_actor_options={"num_cpus": settings.threads},
            graceful_shutdown_timeout_s=60,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run(deployed.bind(settings, os.environ.get(TOKEN)), name=APPLICATION)
        for number in (signal.SIGINT, signal.SIGTERM):  # in the place of Ray's handlers, which drop what is accepted
            signal.signal(number, lambda *_: stop.set())
        if ready is not None:
            ready()
        stop.wait()
        serve.delete(APPLICATION)  # waits for what was accepted
        serve.shutdown()
        ray.kill(ray.get_actor(settings.governor, namespace="serve"))
    finally:
        ray.shutdown()
