"""Starts a service on Ray Serve, and ends it: what was accepted is answered first."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from badge_peft.serving.deployment import Service
from badge_peft.serving.preflight import check_settings
from badge_peft.serving.settings import ServiceSettings

TOKEN = "BADGE_PEFT_TOKEN"  # an environment variable
APPLICATION = "badge-peft"
_PROXY = 300  # seconds within which a proxy has to listen
_SHUTDOWN = 60  # seconds in which a replica finishes what it has accepted
_ENVIRONMENT = {  # of the processes of a Ray that is started here
    # a busy machine takes longer than Ray's 5 seconds to start a proxy, which Ray would start over and over again
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0",  # Ray's workers are nice to all else: a service is not to be
}


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


def replica_options(settings: ServiceSettings) -> dict[str, Any]:
    """How many replicas Ray Serve starts, and what each takes.

    Raises:
        ValueError: Ray Serve does not take the autoscaling, or a number of replicas stands beside it.
    """
    number: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.autoscaling is not None:
        given = {"target_ongoing_requests": settings.batch_size, **settings.autoscaling}
        unknown = sorted(set(given) - set(AutoscalingConfig.model_fields))
        if unknown:
            known = ", ".join(sorted(AutoscalingConfig.model_fields))
            raise ValueError(f"autoscaling has no field {unknown[0]!r}; Ray Serve's AutoscalingConfig has {known}.")
        try:
            AutoscalingConfig(**given)
        except ValueError as error:  # pydantic's, of several lines
            reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())  # type: ignore[attr-defined]
            raise ValueError(f"autoscaling={settings.autoscaling} is not allowed: {reason}.") from error
        number = {"autoscaling_config": given}
    return {
        **number,
        "max_ongoing_requests": settings.limits.waiting_rows + 100,  # more than are accepted: those get a 429
        "ray_actor_options": {"num_cpus": settings.threads},
        "user_config": {"report": True},  # or Ray Serve does not call `reconfigure`
        "health_check_period_s": 2.0,  # a replica that has died is noticed within it
        "graceful_shutdown_timeout_s": _SHUTDOWN,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


def most_replicas(settings: ServiceSettings) -> int:
    """How many replicas there can be."""
    return settings.replicas if settings.autoscaling is None else settings.autoscaling.get("max_replicas", 1)


def run_service(
    settings: ServiceSettings,
    host: str,
    port: int,
    address: str | None = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serves until a signal (INT or TERM) comes, and then finishes what was accepted.

    On a cluster every machine with a replica listens at the port, and one service runs at a time.

    Args:
        settings: What to serve.
        host: To listen at.
        port: To listen at.
        address: Of a Ray cluster; None starts one here, for this service alone.
        ready: Called once requests are answered.

    Raises:
        OSError: the port is in use.
        ValueError: the adapter cannot be served, no target can be kept, Ray Serve does not take the autoscaling, or
            the cluster has a service already, or listens elsewhere.
    """
    stop = threading.Event()
    check_settings(settings)
    settings, options = _absolute(settings), replica_options(settings)
    if address is None:
        check_port(host, port)
    try:
        try:
            _connect(settings, host, port, address)
            _deploy(settings, options, address)
        except Exception as error:  # Ray has many kinds; a message holds the replica's traceback
            raise ValueError(f"the service has not started: {last_error(str(error))}") from error
        for number in (signal.SIGINT, signal.SIGTERM):  # in the place of Ray's handlers, which drop what is accepted
            signal.signal(number, lambda *_: stop.set())
        _wait_for_proxy(host, port, address)
        if ready is not None:
            ready()
        stop.wait()
        _end(settings, address)
    finally:
        ray.shutdown()


def _absolute(settings: ServiceSettings) -> ServiceSettings:
    """With whole paths: processes of a cluster have another working directory."""

    def whole(place: Any) -> Any:
        return str(Path(place).resolve()) if place is not None and Path(place).exists() else place

    given = settings.adapter
    adapter = {task: whole(place) for task, place in given.items()} if isinstance(given, dict) else whole(given)
    return replace(settings, adapter=adapter, base_model=whole(settings.base_model))


def _connect(settings: ServiceSettings, host: str, port: int, address: str | None) -> None:
    """Starts Ray and Ray Serve, or connects to those of a cluster.

    Raises:
        ValueError: the cluster has a service already, or Ray Serve listens elsewhere there.
    """
    cores = most_replicas(settings) * settings.threads + 1  # what Ray counts, so that it never waits for a machine
    own: dict[str, Any] = {} if address else {"num_cpus": max(cores, os.cpu_count() or 1), "include_dashboard": False}
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(address=address or "local", namespace="serve", **own)
    with suppress(TimeoutError):  # of Ray's own 60 seconds for a proxy, which a busy machine gets later
        serve.start(http_options={"host": host, "port": port})
    if address is None:
        return
    if APPLICATION in serve.status().applications:
        raise ValueError(
            "there is a service on this cluster already: end it first, by INT or TERM for its `badge-peft serve`, or "
            "by `serve shutdown`."
        )
    from ray.serve.context import _get_global_client  # nothing public tells where Ray Serve listens

    there = _get_global_client().http_config
    if (there.host, there.port) != (host, port):  # Ray says so in its log, and goes on
        raise ValueError(
            f"Ray Serve listens at {there.host}:{there.port} on this cluster: give --host {there.host} --port "
            f"{there.port}, or end it with `serve shutdown`."
        )


def _deploy(settings: ServiceSettings, options: dict[str, Any], address: str | None) -> None:
    """Starts the replicas; where they do not start, nothing is left on a cluster."""
    deployed = Service.options(**options)  # type: ignore[attr-defined]
    try:
        serve.run(deployed.bind(settings, os.environ.get(TOKEN)), name=APPLICATION)
    except Exception:
        if address is not None:
            _end(settings, address)
        raise


def _end(settings: ServiceSettings, address: str | None) -> None:
    """Finishes what was accepted, and ends all that belongs to the service."""
    serve.delete(APPLICATION)  # waits for what was accepted
    if address is None:  # on a cluster there may be other applications
        serve.shutdown()
    with suppress(ValueError):  # no replica has come as far as making one
        ray.kill(ray.get_actor(settings.governor, namespace="serve"))


def _wait_for_proxy(host: str, port: int, address: str | None) -> None:
    """Until somebody listens: here, or anywhere on a cluster.

    Raises:
        ValueError: nobody does.
    """
    end, reason = time.monotonic() + _PROXY, "no proxy has started"
    while time.monotonic() < end:
        if address is not None:
            if "HEALTHY" in serve.status().proxies.values():
                return
        else:
            try:
                socket.create_connection((host if host != "0.0.0.0" else "127.0.0.1", port), 5).close()
                return
            except OSError as error:
                reason = str(error)
        time.sleep(0.1)
    raise ValueError(f"the service has not started: nobody listens at {host}:{port} ({reason}).")


def last_error(message: str) -> str:
    """The last line of a traceback in a message that says what went wrong; the message where there is none."""
    lines = [line.strip() for line in message.splitlines()]
    found = [line for line in lines if re.match(r"[A-Za-z_.]+(Error|Exception): ", line)]
    return found[-1].partition(": ")[2] if found else " ".join(lines)
