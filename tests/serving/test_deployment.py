"""What the service refuses before a replica sees it, by the application itself, without a server."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("ray", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")
pytestmark = pytest.mark.slow  # Ray takes seconds to import

from badge_peft.serving.deployment import api  # noqa: E402

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "said"),
    [
        ("GET", "/x", {}, 404, "there is no GET /x here: the page /docs"),
        ("GET", "/predict", {}, 405, "there is no GET /predict here"),
        ("POST", "/predict", {"content": b'{"inputs": "\xff"}', "headers": JSON}, 400, "JSON in UTF-8"),
        ("POST", "/predict", {"content": b'{"inputs": ', "headers": JSON}, 422, "no JSON: Expecting value"),
        ("POST", "/predict", {"content": b"x" * 5_000_000}, 413, "send the texts in parts"),
        ("PUT", "/policy", {"json": {"no": "field"}}, 403, "BADGE_PEFT_TOKEN"),
    ],
)
def test_a_refusal_has_its_status_and_the_remedy(method, path, more, status, said):
    async def ask():
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **more)

    answer = asyncio.run(ask())
    assert answer.status_code == status and said in answer.json()["detail"]
    assert ("connection" in answer.headers) == (status in (403, 413))  # the rest of the body is not read
    assert answer.headers.get("allow") == ("POST" if status == 405 else None)
