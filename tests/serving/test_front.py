"""`Front`: what is too large never reaches the application, and every request is counted once, however it ends."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest

from badge_peft.serving.front import Front, set_front


def ask(application, parts, headers=(), path="/predict", root_path=""):
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

    set_front(5, lambda path, status: counted.append((path, status)))
    scope = {"type": "http", "headers": list(headers), "path": path, "root_path": root_path}
    try:
        asyncio.run(Front(application)(scope, receive, send))
    except (Exception, asyncio.CancelledError) as error:
        raised = error
    finally:
        set_front(4 * 2**20, lambda path, status: None)
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
