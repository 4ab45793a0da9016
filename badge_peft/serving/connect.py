"""Ray and Ray Serve for a service: started here for it alone, or those of a cluster."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPException
from typing import Any

import grpc  # which Ray brings
import ray
from ray import serve

from badge_peft.utils.clusters import AUTH, no_cluster

APPLICATION = "badge-peft"
_PROXY = 300  # seconds within which a proxy has to listen
_LAST = 1.0  # seconds in which answers that replicas have given are with their clients
_ENVIRONMENT = {  # of the processes of a Ray that is started here
    # a busy machine takes longer than Ray's 5 seconds to start a proxy, which Ray would start over and over again
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0",  # Ray's workers are nice to all else: a service is not to be
    # where RAY_SERVE_ENABLE_HA_PROXY=1 puts HAProxy before the replicas: what it counts is counted here, and nobody
    # else has to notice that a replica ends
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}
_PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")  # of HAProxy; any that is free


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


def start_ray(host: str, port: int, cores: int) -> None:
    """Starts Ray on this machine, with Ray Serve, which listens at the port.

    Args:
        host: To listen at.
        port: To listen at.
        cores: That Ray counts on at least: a service shares those that are there.
    """
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    for name, value in (_ENVIRONMENT | ports).items():
        os.environ.setdefault(name, value)
    cores = max(cores, os.cpu_count() or 1)
    ray.init("local", namespace="serve", num_cpus=cores, include_dashboard=False, logging_level="WARNING")
    _start_serve(host, port)


def join_cluster(address: str, host: str, port: int) -> None:
    """Connects to a Ray cluster, and starts Ray Serve on it, where that does not run yet.

    Raises:
        OSError: there is no such cluster.
        ValueError: it has a service already, Ray Serve listens elsewhere there, or it asks nobody for a token and the
            environment does not say that it may.
    """
    try:
        ray.init(address, namespace="serve", logging_level="WARNING")
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise OSError(no_cluster(address, error)) from error
    if os.environ.get(AUTH, "token") == "token" and _obeys_everybody():
        raise ValueError(
            f"the cluster at {address} asks nobody for a token: all who reach it run code there. Start it with "
            f"{AUTH}=token, or join it as it is with {AUTH}=disabled."
        )
    _start_serve(host, port)
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


def wait_for_proxy(host: str, port: int, address: str | None) -> None:
    """Until a replica answers here, or a proxy listens on the cluster.

    Raises:
        ValueError: none does.
    """
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
    raise ValueError(f"the service has not started: nobody answers at {host}:{port}.")


def end_serve() -> None:
    """Ends Ray Serve where it was started here, its proxy first, which else says that there is no such path."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        time.sleep(_LAST)
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["name"].startswith("SERVE_PROXY"):
                ray.kill(ray.get_actor(actor["name"], actor["namespace"]))
    serve.shutdown()


def _start_serve(host: str, port: int) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # each step of a start is no news to who asked for it
    # of Ray's own 60 seconds for a proxy, and of one that Ray has replaced: a busy machine gets it later
    with suppress(TimeoutError, ray.exceptions.RayActorError):
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})


def _free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [str(probe.getsockname()[1]) for probe in probes]
