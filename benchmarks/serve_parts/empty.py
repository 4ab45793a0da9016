"""A Ray Serve deployment that answers `POST /predict` without a model: what HTTP, FastAPI and Ray Serve take alone."""

from __future__ import annotations

import argparse
import signal
import threading
from typing import Any, get_type_hints

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve

api = FastAPI()


def typed(method: Any) -> Any:
    """With types for names: the replica knows no names of this module."""
    method.__annotations__ = get_type_hints(method)
    return method


@serve.deployment(max_ongoing_requests=2100)
@serve.ingress(api)
class Empty:
    """Takes inputs in batches, as the service does."""

    @api.get("/healthz")
    @typed
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.post("/predict")
    @typed
    async def predict(self, request: Request) -> Any:
        body = await request.json()
        return JSONResponse(await self.answer(body["inputs"]))

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def answer(self, works: list[Any]) -> list[Any]:
        return [[{"label": "none", "score": 1.0, "exit_layer": 0}] * len(work) for work in works]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    stop = threading.Event()
    ray.init(address="local", include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Empty.options(logging_config={"enable_access_log": False}).bind(), name="empty")  # type: ignore[attr-defined]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"serving at http://127.0.0.1:{port}", flush=True)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
