"""`benchmarks/serve.py` on a service that is made up: what is counted, what a kill costs, and the page."""

from __future__ import annotations

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest

httpx = pytest.importorskip("httpx", reason="the benchmark needs httpx")
import serve  # noqa: E402
from serve_parts import kills, overhead  # noqa: E402
from serve_parts.client import FAILED, Sent, bodies, play  # noqa: E402
from serve_parts.page import summary  # noqa: E402
from serve_parts.traffic import arrivals, shapes  # noqa: E402

TEXTS = [f"text {i}" for i in range(40)]


class Handler(BaseHTTPRequestHandler):
    """Labels a text by its last digit, at full depth all of them right, else those of even numbers; each text has its
    own score. Every fifth request is refused where `busy`."""

    protocol_version = "HTTP/1.1"
    depth, busy, count = 6, False, 0

    def do_GET(self) -> None:
        self._say(200, {})

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        Handler.count += 1
        if Handler.busy and Handler.count % 5 == 0:
            self._say(429, {"detail": "busy"})
            return
        self._say(200, [self._answer(text) for text in texts])

    def _answer(self, text: str) -> dict[str, object]:
        right = self.depth == 6 or int(text[-1]) % 2 == 0
        return {"label": text[-1] if right else "?", "score": int(text.split()[1]) / 100, "exit_layer": self.depth}

    def _say(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for part in ("model;dur=1.50", "body;dur=0.25, total;dur=2.25"):
            self.send_header("Server-Timing", part)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url():
    Handler.depth, Handler.busy, Handler.count = 6, False, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def running(url, monkeypatch):
    """In the place of a service: it knows its setting, and has this process as its one replica."""

    class Running:
        def __init__(self, command, log, environment=None):
            self.url, self.processes = url, [psutil.Process()]
            self.client = httpx.Client(base_url=url)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.client.close()

        def change(self, early_exit=None, target=None, **_):
            Handler.depth = 6 if early_exit == {"policy": "never"} else 2
            return {"early_exit": {"default": {"policy": "divergence"}}}

        def replicas(self):
            return {"one": os.getpid()}

        def cpu_seconds(self):
            return time.process_time()

    monkeypatch.setattr(serve, "Running", Running)
    monkeypatch.setattr(overhead, "Running", Running)
    monkeypatch.setattr(overhead, "bare", lambda _: lambda text: {"seconds": 0.001, "cpu": 1.0})
    monkeypatch.setattr(serve, "WARM", 0.05)
    return Running


def test_arrivals_follow_the_traffic():
    bursts = shapes(1.0)["bursts"]
    times = arrivals(bursts, 400.0, 4, seed=0)
    assert times == sorted(times) and times[-1] < bursts.seconds
    busy = sum(map(bursts.busy, times)) / 30  # two bursts of 15 seconds
    quiet = sum(not bursts.busy(t) for t in times) / (bursts.seconds - 30)
    assert busy == pytest.approx(200, rel=0.1) and quiet == pytest.approx(50, rel=0.1)
    day = shapes(1.0)["day"]
    middle = [t for t in arrivals(day, 400.0, 4, seed=0) if 25 < t < 35]
    assert len(middle) == pytest.approx(10 * 160, rel=0.15)
    assert day.peak == pytest.approx(max(day.rate(s) for s in range(61)))


def test_requests_are_sent_at_their_time_whatever_comes_of_those_before(url):
    Handler.busy = True
    times = list(np.arange(20) * 0.01)
    sent = play(url, bodies(TEXTS, 4), times)
    assert [request.at for request in sent] == times and all(0 <= r.lag <= r.seconds < 5 for r in sent)
    assert [r.status for r in sent].count(429) == 4
    for request in sent:
        assert len(request.answers) == (4 if request.status == 200 else 0)
    assert sent[0].rows == sent[10].rows == [0, 1, 2, 3]


def test_what_became_of_requests_is_told_apart():
    expected = [{"label": "a", "exit_layer": 2, "score": i / 10} for i in range(4)]

    def sent(status: int, answers: list, rows: list[int]) -> Sent:
        return Sent(0.0, 0.0, 0.1, status, rows, json.dumps(answers).encode())

    found = kills.count(
        [
            sent(200, expected[:2], [0, 1]),
            sent(200, expected[1:3], [0, 1]),  # of another request
            sent(200, expected[:1], [0, 1]),  # too few
            sent(500, [], [0]),
            sent(FAILED, [], [0]),
        ],
        expected,
    )
    assert found == {"requests": 5, "answered": 3, "wrong": 2, "errors": {"500": 1, "connection": 1}}


def test_replicas_are_killed_while_requests_are_sent(running, url, monkeypatch):
    killed = []
    monkeypatch.setattr(kills.os, "kill", lambda number, _: killed.append(number))
    service = running(None, None)
    Handler.busy = True
    service.change(early_exit={"policy": "never"})
    expected = [{"label": text[-1], "exit_layer": 6, "score": int(text.split()[1]) / 100} for text in TEXTS]
    found = kills.measure(service, bodies(TEXTS, 4), expected, 2, 1, 0.05, every=0.1)
    assert killed == [os.getpid()] * 2 and found["kills"] == 2
    both = kills.together([found] * 2)
    assert both["kills"] == 4 and both["errors"]["429"] == 2 * found["errors"]["429"] and both["replicas"] == 1
    assert both["requests"] == 2 * found["requests"]
    assert found["wrong"] == 0 and found["errors"]["429"] > 0 and found["answered"] > 0


@pytest.mark.exhaustive
def test_the_load_test_and_its_page(running, tmp_path):
    pytest.importorskip("matplotlib")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text, "label": text[-1]}) for text in TEXTS))
    options = ["--json", str(tmp_path / "serve.json"), "--log", str(tmp_path / "log"), "--size", "4"]
    assert serve.main(["adapter", str(texts), *options, "--scale", "0.01"]) == 0
    data = json.loads((tmp_path / "serve.json").read_text())
    assert serve.main(["adapter", str(texts), *options, "--scale", "0.01", "--overhead"]) == 0
    data = json.loads((tmp_path / "serve.json").read_text())
    service = data["overhead"]["ways"]["the service behind HAProxy, full depth"]
    assert (service["model"], service["body"], service["total"]) == (1.5, 0.25, 2.25) and service["p50"] > 0
    assert data["overhead"]["ways"]["the model, in one process"]["p50"] == 1.0 and len(data["overhead"]["most"]) == 2
    for ways in data["runs"].values():
        assert {way: summary(requests, 0.5)["score"] for way, requests in ways.items()} == {
            "stock": 1.0,
            "fixed": pytest.approx(0.5, abs=0.2),
            "controller": pytest.approx(0.5, abs=0.2),
        }
    data["kills"] = {
        **{"kills": 2, "replicas": 2, "requests": 90, "answered": 88, "wrong": 0},
        **{"errors": {"500": 2}},
    }
    (tmp_path / "serve.json").write_text(json.dumps(data))
    page = tmp_path / "results" / "serving.md"
    page.parent.mkdir()
    assert serve.main([*options, "--docs", str(page)]) == 0
    text = page.read_text()
    assert "the model takes 0.50 ms" in text and "HAProxy" in text
    assert "BADGE, controller" in text and "2 times one of 2 replicas was killed" in text and "2 with 500" in text
    for picture in ("bursts", "day"):
        assert f"serving/{picture}.png" in text and (page.parent / "serving" / f"{picture}.png").stat().st_size > 1000
