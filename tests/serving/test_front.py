"""`Front`: what is too large never reaches the application, and every request is counted once, however it ends."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest

pytest.importorskip("anyio", reason="the extra `serve` is not installed")
pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from badge_peft.serving.front import Front, set_front  # noqa: E402
from badge_peft.serving.settings import Limits  # noqa: E402


def ask(application, parts, headers=(), path="/predict", root_path="", method="POST", token=None):
    """The messages that one request gets, what was counted, and what it raised."""
    counted: list[tuple[str, int]] = []
    messages = [{"type": "http.request", "body": p, "more_body": i < len(parts) - 1} for i, p in enumerate(parts)]
    messages.append({"type": "http.disconnect"})
    sent: list[dict] = []
    raised = None

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    set_front(Limits(body_bytes=5), lambda path, status: counted.append((path, status)), token)
    scope = {"type": "http", "method": method, "headers": list(headers), "path": path, "root_path": root_path}
    try:
        asyncio.run(Front(application)(scope, receive, send))
    except (Exception, asyncio.CancelledError) as error:
        raised = error
    finally:
        set_front(Limits(), lambda path, status: None)
    return sent, counted, raised


def answering(status, read):
    async def application(scope, receive, send):
        read.append((await receive())["body"])
        await send({"type": "http.response.start", "status": status, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"[]"})

    return application


@pytest.mark.parametrize(
    ("headers", "parts", "status"),
    [
        ([], [b"12345"], 200),
        ([], [b"123", b"456"], 413),
        ([(b"content-length", b"6")], [b""], 413),
        ([(b"content-length", b"x")], [b""], 413),
        ([(b"content-length", b"5")], [b"12", b"345"], 200),
    ],
)
def test_a_body_that_is_too_large_never_reaches_the_application(headers, parts, status):
    read: list[bytes] = []
    sent, counted, _ = ask(answering(200, read), parts, headers)
    assert sent[0]["status"] == status and counted == [("/predict", status)]
    assert read == ([b"".join(parts)] if status == 200 else [])
    if status == 413:
        assert "5 bytes" in json.loads(sent[1]["body"])["detail"]


@pytest.mark.parametrize(
    ("path", "root_path", "name"),
    [("/rerank", "", "/rerank"), ("/a/policy", "/a", "/policy"), ("/admin.php", "", "other"), ("/docs", "", "other")],
)
def test_each_request_is_counted_by_its_path_and_status(path, root_path, name):
    sent, counted, _ = ask(answering(401, []), [b""], path=path, root_path=root_path)
    assert counted == [(name, 401)]
    kept, (name, _) = sent[0]["headers"]
    assert kept == (b"a", b"b") and name == b"server-timing"


@pytest.mark.parametrize(
    ("token", "header", "status"),
    [("x", None, 401), ("x", b"Bearer y", 401), (None, b"Bearer x", 403), ("x", b"Bearer x", 200)],
)
def test_a_change_shows_the_token_before_its_body_is_read(token, header, status):
    read: list[bytes] = []
    headers = [] if header is None else [(b"authorization", header)]
    sent, counted, _ = ask(answering(200, read), [b"no json, and long"[:5]], headers, "/policy", "", "PUT", token)
    assert sent[0]["status"] == status and counted == [("/policy", status)]
    assert read == ([b"no js"] if status == 200 else [])


def test_a_head_is_answered_as_a_get():
    async def application(scope, receive, send):
        assert scope["method"] == "GET"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent, counted, raised = ask(application, [b""], path="/healthz", method="HEAD")
    assert raised is None and sent[0]["status"] == 200 and counted == [("/healthz", 200)]


def test_the_time_of_a_request_is_told_and_how_much_of_it_was_its_body(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("badge_peft.serving.front.perf_counter", lambda: next(ticks))  # a second passes at each look
    sent, _, _ = ask(answering(200, []), [b"12", b"345"])
    assert sent[0]["headers"][-1] == (b"server-timing", b"body;dur=2000.00, total;dur=5000.00")


def test_failures_and_clients_that_have_gone_are_counted():
    async def fails(scope, receive, send):
        raise RuntimeError("of the application")

    async def is_cancelled(scope, receive, send):
        raise asyncio.CancelledError

    _, counted, raised = ask(fails, [b""])
    assert counted == [("/predict", 500)] and isinstance(raised, RuntimeError)
    _, counted, raised = ask(is_cancelled, [b""])
    assert counted == [("/predict", 499)] and isinstance(raised, asyncio.CancelledError)
    sent, counted, _ = ask(answering(200, []), [])  # gone before its body was there
    assert counted == [("/predict", 499)] and sent == []


def test_what_is_no_request_passes():
    seen = []

    async def application(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Front(application)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


class Client:
    """One that sends its body in parts, when it is told to."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[dict] = asyncio.Queue()
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.task: asyncio.Task | None = None

    def sends(self, body: bytes, more: bool = True) -> None:
        self.parts.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def starts(self, application) -> None:
        async def send(message):
            if message["type"] == "http.response.start":
                self.status, self.headers = message["status"], dict(message["headers"])

        scope = {"type": "http", "method": "POST", "headers": [], "path": "/predict"}
        self.task = asyncio.ensure_future(Front(application)(scope, self.parts.get, send))


@pytest.fixture
def front():
    yield lambda **limits: set_front(Limits(**limits), lambda path, status: None)
    set_front(Limits(), lambda path, status: None)


@pytest.mark.anyio
async def test_a_body_that_does_not_come_is_given_up(front):
    front(body_seconds=0.05)
    slow, read = Client(), []
    slow.sends(b"1")
    slow.starts(answering(200, read))
    await asyncio.wait_for(slow.task, 10)
    assert slow.status == 408 and slow.headers[b"connection"] == b"close" and read == []


@pytest.mark.anyio
async def test_bodies_together_are_bounded_and_small_ones_pass(front):
    front(body_bytes=100)  # so 1600 of all
    large, small, read = [Client() for _ in range(30)], Client(), []
    for client in large:
        client.sends(b"x" * 99)
        client.starts(answering(200, read))
    await asyncio.sleep(0)
    await asyncio.wait([client.task for client in large], timeout=0.1)
    refused = [client for client in large if client.status is not None]
    assert {client.status for client in refused} == {429} and refused[0].headers[b"retry-after"] == b"1"
    assert 99 * (len(large) - len(refused)) <= 1600
    small.sends(b"small", more=False)
    small.starts(answering(200, read))
    await small.task
    assert small.status == 200
    for client in large:
        if client not in refused:
            client.parts.put_nowait({"type": "http.disconnect"})
            await client.task
    again = Client()  # what they held is free again
    again.sends(b"x" * 99, more=False)
    again.starts(answering(200, read))
    await again.task
    assert again.status == 200 and read == [b"small", b"x" * 99]
