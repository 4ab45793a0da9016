"""Starts a service on Ray Serve, here or on a cluster, and ends it: what was accepted is answered first."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import grpc  # which Ray brings
import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig

from badge_peft.serving.deployment import Service
from badge_peft.serving.settings import TOKEN, ServiceSettings, check_settings
from badge_peft.utils.extras import AUTH, no_cluster

APPLICATION = "badge-peft"
_SHUTDOWN = 60  # seconds in which a replica finishes what it has accepted
_PROXY = 300  # seconds within which a proxy has to listen
_LAST = 1.0  # seconds in which answers that replicas have given are with their clients
_SLOTS = 100_000  # requests that Ray hands to a replica, which refuses by itself: slow ones are not to fill them up
_ENVIRONMENT = {  # of the processes of a Ray that is started here
    # a busy machine takes longer than Ray's 5 seconds to start a proxy, which Ray would start over and over again
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # and kills one that is busy for 30 seconds; one that has died is noticed after three checks, of 10 seconds each
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    "RAY_worker_niceness": "0",  # Ray's workers are nice to all else: a service is not to be
    # where RAY_SERVE_ENABLE_HA_PROXY=1 puts HAProxy before the replicas: what it counts is counted here, and nobody
    # else has to notice that a replica ends
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}
_PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")  # of HAProxy; any that is free


def replica_options(settings: ServiceSettings) -> dict[str, Any]:
    """How many replicas Ray Serve starts, and what each takes; a ValueError where it does not take the autoscaling."""
    number: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.autoscaling is not None:
        given = {"target_ongoing_requests": settings.batch_size, **settings.autoscaling}
        known = AutoscalingConfig.model_fields
        for name in given:
            if name not in known:
                raise ValueError(
                    f"autoscaling has no field {name!r}; Ray Serve's AutoscalingConfig has {', '.join(sorted(known))}."
                )
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
        OSError: the port is in use, or there is no such cluster.
        ValueError: the adapter cannot be served, no target can be kept, Ray Serve does not take the autoscaling, or
            the cluster has a service already, listens elsewhere, or needs no token.
    """
    stop = threading.Event()
    check_settings(settings)
    settings, options = _absolute(settings), replica_options(settings)
    if address is None:
        _check_port(host, port)
    joined = False
    try:
        try:
            if address is None:  # Ray counts cores, and is never to wait for a machine
                _start_ray(host, port, most_replicas(settings) * settings.threads + 1)
            else:
                _join_cluster(address, host, port)
                joined = True
            deployed = Service.options(**options)  # type: ignore[attr-defined]  # the decorator of Ray Serve adds it
            serve.run(deployed.bind(settings, os.environ.get(TOKEN)), name=APPLICATION)
            _wait_for_proxy(host, port, address)
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
        if isinstance(place, dict):
            return {task: whole(own) for task, own in place.items()}
        return str(Path(place).resolve()) if place is not None and Path(place).exists() else place

    return replace(settings, adapter=whole(settings.adapter), base_model=whole(settings.base_model))


def _check_port(host: str, port: int) -> None:
    """Refuses a port that is in use, before anything is started."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen at {host}:{port} ({error}): choose another --port or --host.") from error


def _start_ray(host: str, port: int, cores: int) -> None:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("", 0))) for _ in _PORTS]
        free = {name: str(probe.getsockname()[1]) for name, probe in zip(_PORTS, probes, strict=True)}
    for name, value in (_ENVIRONMENT | free).items():
        os.environ.setdefault(name, value)
    cores = max(cores, os.cpu_count() or 1)
    ray.init("local", namespace="serve", num_cpus=cores, include_dashboard=False, logging_level="WARNING")
    start_serve(host, port)


def _join_cluster(address: str, host: str, port: int) -> None:
    """Connects to a cluster, and starts Ray Serve on it, where that does not run yet."""
    try:
        ray.init(address, namespace="serve", logging_level="WARNING")
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise OSError(no_cluster(address, error)) from error
    if os.environ.get(AUTH, "token") == "token" and _obeys_everybody():
        raise ValueError(
            f"the cluster at {address} needs no token: everyone who reaches it can run code there. Start it with "
            f"{AUTH}=token, or join it as it is with {AUTH}=disabled."
        )
    start_serve(host, port)
    if APPLICATION in serve.status().applications:
        raise ValueError(
            "there is a service on this cluster already: end it first, by INT or TERM for its `badge-peft serve`, or "
            "by `serve shutdown`."
        )
    from ray.serve.context import _get_global_client  # nothing public tells where Ray Serve listens

    there: Any = _get_global_client().http_config
    if (there.host, there.port) != (host, port):  # Ray says so in its log, and goes on
        raise ValueError(
            f"Ray Serve listens at {there.host}:{there.port} on this cluster: give --host {there.host} --port "
            f"{there.port}, or end it with `serve shutdown`."
        )


def _obeys_everybody() -> bool:
    """Whether the cluster answers a call without a token."""
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel, suppress(grpc.RpcError):
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=30)
        return True
    return False


def start_serve(host: str, port: int) -> None:
    """Starts Ray Serve on the Ray that this process is connected to."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # each step of a start is no news to who asked for it
    # of Ray's own 60 seconds for a proxy, and of one that Ray has replaced: a busy machine gets it later
    with suppress(TimeoutError, ray.exceptions.RayActorError):
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})


def _wait_for_proxy(host: str, port: int, address: str | None) -> None:
    """Until a replica answers here, or a proxy listens on the cluster."""
    end = time.monotonic() + _PROXY
    here = "127.0.0.1" if host == "0.0.0.0" else host
    while time.monotonic() < end:
        if address is None:
            with suppress(OSError, HTTPException):
                connection = HTTPConnection(here, port, timeout=5)
                connection.request("GET", "/healthz")
                if connection.getresponse().status == 200:
                    return
        elif "HEALTHY" in serve.status().proxies.values():
            return
        time.sleep(0.1)
    raise ValueError(f"the service has not started: nothing answers at {host}:{port}.")


def _end(settings: ServiceSettings, address: str | None) -> None:
    """Takes no more, finishes what was accepted, and ends all that belongs to the service."""
    with suppress(ValueError, ray.exceptions.RayError):  # no replica has made a governor, or it has just died
        governor, end = ray.get_actor(settings.governor, namespace="serve"), time.monotonic() + _SHUTDOWN
        state = ray.get(governor.end.remote())
        while (state["waiting"] or not state["on_all_replicas"]) and time.monotonic() < end:
            time.sleep(settings.report_every)
            state = ray.get(governor.state.remote())
    if address is not None:  # on a cluster there may be other applications
        serve.delete(APPLICATION)  # from now on there is no such path, Ray Serve says
    else:
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":  # the proxy first, which else says the same
            time.sleep(_LAST)
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if actor["name"].startswith("SERVE_PROXY"):
                    ray.kill(ray.get_actor(actor["name"], actor["namespace"]))
        serve.shutdown()
    with suppress(ValueError):
        ray.kill(ray.get_actor(settings.governor, namespace="serve"))


def last_error(message: str) -> str:
    """The last line of a traceback in a message that says what went wrong; the message where there is none."""
    lines = [line.strip() for line in message.splitlines()]
    found = [line for line in lines if re.match(r"[A-Za-z_.]+(Error|Exception): ", line)]
    return found[-1].partition(": ")[2] if found else " ".join(lines)
