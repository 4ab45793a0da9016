"""A started service among people who mean it harm: which ports listen and whom they obey, clients that send slowly,
half or far too much, and the end under load."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ray = pytest.importorskip("ray", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")

from tests.serving.adapters import save_adapter  # noqa: E402
from tests.serving.running import Running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # two minutes of two cores
BODY = 2**20


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    adapter = save_adapter(tmp_path_factory.mktemp("adapter"))
    # no folder of the user's can be written: the token of Ray lies in none
    service = Running(
        tmp_path_factory.mktemp("service"), str(adapter), "--max-body-bytes", str(BODY), HOME="/dev/null"
    )
    yield service
    service.kill()


def processes(running: Running) -> list[psutil.Process]:
    own = psutil.Process(running.process.pid)
    return [own, *own.children(recursive=True)]


def named(running: Running, *names: str) -> list[psutil.Process]:
    return [process for process in processes(running) if any(name in " ".join(process.cmdline()) for name in names)]


def memory(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


def connections(running: Running, count: int, start: bytes) -> list[socket.socket]:
    found = []
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", running.client.base_url.port), timeout=30)
        one.sendall(start)
        found.append(one)
    return found


def post(length: int) -> bytes:
    return (
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length
    )


class Harm:
    """A pickle that writes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_no_port_runs_code_without_the_token(running, tmp_path):
    import grpc
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    listening = {
        (socks.laddr.port, "".join(process.cmdline()[:1]) + process.name())
        for process in processes(running)
        for socks in process.net_connections("tcp")
        if socks.status == psutil.CONN_LISTEN
    }
    assert any("gcs_server" in name for _, name in listening) and any("Replica" in name for _, name in listening)
    marks = {(port, kind): tmp_path / f"{kind}-{port}" for port, _ in listening for kind in ("job", "pickle")}
    codes: list[grpc.StatusCode] = []
    for port, _ in listening:
        job = {"entrypoint": f"touch {marks[port, 'job']}"}
        for path in ("/api/jobs/", "/api/job_agent/jobs/"):
            try:
                answer = httpx.post(f"http://127.0.0.1:{port}{path}", json=job, timeout=5)
                assert answer.status_code in (401, 403, 404, 405), (port, answer.text)
            except httpx.HTTPError:  # it does not speak HTTP
                pass
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = ASGIRequest(pickled_request_metadata=pickle.dumps(Harm(marks[port, "pickle"])))
            with pytest.raises(grpc.RpcError) as refused:
                ASGIServiceStub(channel).HandleRequest(request, timeout=5)
            codes.append(refused.value.code())
    (gcs,) = {port for port, name in listening if "gcs_server" in name}
    code = f"import ray; ray.init('127.0.0.1:{gcs}'); ray.get(ray.remote(lambda: None).remote()); print('inside')"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for auth in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        done = subprocess.run([sys.executable, "-c", code], env={**bare, **auth}, capture_output=True, timeout=120)
        assert done.returncode != 0 and b"inside" not in done.stdout and b"Authentication" in done.stderr
    assert [mark for mark in marks.values() if mark.exists()] == []
    assert grpc.StatusCode.UNAUTHENTICATED in codes  # the replica's: it knows the call, which runs code with the token
    token = named(running, "raylet")[0].environ()["RAY_AUTH_TOKEN"]
    for port, name in listening:
        if "Replica" in name:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, suppress(grpc.RpcError):
                request = ASGIRequest(pickled_request_metadata=pickle.dumps(Harm(marks[port, "pickle"])))
                header = (("authorization", f"Bearer {token}"),)
                ASGIServiceStub(channel).HandleRequest(request, timeout=5, metadata=header)
    assert any(mark.exists() for mark in marks.values())
    assert running.predict("still here").status_code == 200


def test_clients_that_do_not_finish_do_not_keep_others_from_answers(running):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4000:
        pytest.skip("a process may not have so many connections here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    slow = connections(running, 2300, post(100) + b'{"inputs":')
    try:
        for _ in range(3):
            assert running.client.get("/healthz", timeout=20).status_code == 200
            assert running.client.post("/predict", json={"inputs": "a text"}, timeout=20).status_code == 200
        slow[0].settimeout(90)
        assert b" 408 " in slow[0].recv(1000)
    finally:
        for one in slow:
            one.close()


def test_halves_of_bodies_take_no_more_memory_than_is_said(running):
    watched = named(running, "ServeReplica", "ProxyActor")
    before, part, most = memory(watched), b'{"inputs": "' + b"x" * (BODY - 100), 0
    for _ in range(3):
        held = []
        for _ in range(600):
            held += connections(running, 1, post(BODY))
            with suppress(OSError):  # it was refused on the way
                held[-1].sendall(part)
        most = max(most, memory(watched))
        assert running.client.post("/predict", json={"inputs": "a text"}, timeout=30).status_code == 200
        for one in held:
            one.close()
    assert most - before < 400e6, (before, most)  # of 1,900 MB that were sent


def test_the_end_under_load_refuses_and_never_says_that_there_is_no_such_path(running):
    statuses: Counter = Counter()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=running.client.base_url, timeout=30) as client:
            while not stop.is_set():
                try:
                    statuses[client.post("/predict", json={"inputs": "a text"}).status_code] += 1
                except httpx.HTTPError as error:
                    statuses[type(error).__name__] += 1
                    stop.wait(0.05)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    running.wait_for(lambda: statuses[200] > 50, 60)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(240) == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert statuses[503] > 0 and {code for code in statuses if isinstance(code, int)} <= {200, 503}, statuses
