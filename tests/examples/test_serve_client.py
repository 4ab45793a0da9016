"""examples/serve_client.py: what it sends, and what it does when the service refuses, dies or is busy."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="the example needs httpx")
EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_client.py"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("serve_client", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(client: Any, monkeypatch: Any, tmp_path: Path, handler: Any, **options: Any) -> list[tuple[str, Any]]:
    """What the example prints for seven texts, with a service that answers as `handler` does; nobody waits."""
    (tmp_path / "texts.txt").write_text("\n".join(f"text {i}" for i in range(7)) + "\n")
    made = httpx.AsyncClient
    monkeypatch.setattr(client.httpx, "AsyncClient", partial(made, transport=httpx.MockTransport(handler)))
    sleep = asyncio.sleep
    monkeypatch.setattr(client.asyncio, "sleep", lambda seconds: sleep(0))
    given = {"per_request": 3, "at_once": 2, "tries": 3, "max_exit": None, **options}
    args = argparse.Namespace(url="http://service", file=tmp_path / "texts.txt", **given)
    return asyncio.run(client.ask_all(args))


def answer(request: Any) -> Any:
    texts = json.loads(request.content)["inputs"]
    return httpx.Response(200, json=[{"label": text, "exit_layer": 2} for text in texts])


def test_each_text_has_its_answer(client, monkeypatch, tmp_path):
    sent = []

    def handler(request: Any) -> Any:
        sent.append(json.loads(request.content))
        return answer(request)

    found = ask(client, monkeypatch, tmp_path, handler, max_exit=3)
    assert [text for text, _ in found] == [said["label"] for _, said in found] == [f"text {i}" for i in range(7)]
    assert sorted(len(body["inputs"]) for body in sent) == [1, 3, 3] and {body["max_exit"] for body in sent} == {3}


def test_answers_of_many_tasks(client, monkeypatch, tmp_path):
    def handler(request: Any) -> Any:
        texts = json.loads(request.content)["inputs"]
        return httpx.Response(200, json={task: [f"{task} {text}" for text in texts] for task in ("a", "b")})

    found = ask(client, monkeypatch, tmp_path, handler)
    assert found[4] == ("text 4", {"a": "a text 4", "b": "b text 4"})


def test_a_busy_or_broken_service_is_asked_again(client, monkeypatch, tmp_path):
    seen = []

    def handler(request: Any) -> Any:
        seen.append(request)
        if len(seen) == 1:
            return httpx.Response(429, headers={"Retry-After": "1"}, json={"detail": "9 texts are waiting"})
        if len(seen) == 2:
            raise httpx.ReadError("gone", request=request)
        return httpx.Response(500) if len(seen) == 3 else answer(request)

    assert len(ask(client, monkeypatch, tmp_path, handler)) == 7 and len(seen) == 6


def test_a_wrong_request_is_not_sent_again(client, monkeypatch, tmp_path):
    seen = []

    def handler(request: Any) -> Any:
        seen.append(request)
        return httpx.Response(413, json={"detail": "send parts"})

    with pytest.raises(RuntimeError, match="413.*send parts"):
        ask(client, monkeypatch, tmp_path, handler, at_once=1)
    assert len({request.content for request in seen}) == len(seen)


def test_a_service_that_never_answers_ends_it(client, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="503"):
        ask(client, monkeypatch, tmp_path, lambda request: httpx.Response(503, text="no replica"))
