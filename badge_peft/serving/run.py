"""Starts a service on Ray Serve, and ends it: what was accepted is answered first."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig

from badge_peft.serving.connect import APPLICATION, check_port, end_serve, join_cluster, start_ray, wait_for_proxy
from badge_peft.serving.deployment import Service
from badge_peft.serving.settings import TOKEN, ServiceSettings, check_settings

_SHUTDOWN = 60  # seconds in which a replica finishes what it has accepted
_SLOTS = 100_000  # requests that Ray hands to a replica, which refuses by itself: slow ones are not to fill them up


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
        except ValidationError as error:  # of several lines
            reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"autoscaling={settings.autoscaling} is not allowed: {reason}.") from error
        number = {"autoscaling_config": given}
    return {
        **number,
        "max_ongoing_requests": _SLOTS,
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
    cores = most_replicas(settings) * settings.threads + 1  # what Ray counts, so that it never waits for a machine
    if address is None:
        check_port(host, port)
    joined = False
    try:
        try:
            if address is None:
                start_ray(host, port, cores)
            else:
                join_cluster(address, host, port)
                joined = True
            deployed = Service.options(**options)  # type: ignore[attr-defined]  # the decorator of Ray Serve adds it
            serve.run(deployed.bind(settings, os.environ.get(TOKEN)), name=APPLICATION)
            wait_for_proxy(host, port, address)
        except BaseException as error:  # INT and TERM are none of Exception
            if joined:  # nothing is left on a cluster; a governor, which may be on its way, ends by itself
                serve.delete(APPLICATION, _blocking=False)
            if not isinstance(error, Exception):
                raise
            # Ray has many kinds; a message holds the replica's traceback
            raise ValueError(f"the service has not started: {last_error(str(error))}") from error
        for number in (signal.SIGINT, signal.SIGTERM):  # in the place of Ray's handlers, which drop what is accepted
            signal.signal(number, lambda *_: stop.set())
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


def _end(settings: ServiceSettings, address: str | None) -> None:
    """Takes no more, finishes what was accepted, and ends all that belongs to the service."""
    with suppress(ValueError, ray.exceptions.RayError):  # no replica has made a governor, or it has just died
        governor, end = ray.get_actor(settings.governor, namespace="serve"), time.monotonic() + _SHUTDOWN
        state = ray.get(governor.end.remote())
        while (state["waiting"] or not state["on_all_replicas"]) and time.monotonic() < end:
            time.sleep(settings.report_every)
            state = ray.get(governor.state.remote())
    if address is None:
        end_serve()
    else:  # on a cluster there may be other applications
        serve.delete(APPLICATION)  # from now on there is no such path, Ray Serve says
    with suppress(ValueError):
        ray.kill(ray.get_actor(settings.governor, namespace="serve"))


def last_error(message: str) -> str:
    """The last line of a traceback in a message that says what went wrong; the message where there is none."""
    lines = [line.strip() for line in message.splitlines()]
    found = [line for line in lines if re.match(r"[A-Za-z_.]+(Error|Exception): ", line)]
    return found[-1].partition(": ")[2] if found else " ".join(lines)
