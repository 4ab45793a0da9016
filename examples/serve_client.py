"""Asks a service that `badge-peft serve` started, for many texts, several requests at a time.

usage: python examples/serve_client.py http://127.0.0.1:8000 texts.txt [--per-request 32] [--at-once 4] [--max-exit 3]

A request that is refused because too many wait (429), or that ends because a replica has died or the service is ending
(500, 503 or no answer), is sent again after a while; one that is wrong (any other 4xx) ends the program with the
service's own words. It needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

AGAIN = (429, 500, 502, 503)


async def ask(client: httpx.AsyncClient, body: dict[str, Any], tries: int) -> Any:
    """The answers to the texts of one request.

    Raises:
        RuntimeError: the service refuses it, or does not answer `tries` times.
    """
    reason = ""
    for number in range(tries):
        try:
            answer = await client.post("/predict", json=body)
        except httpx.TransportError as error:  # no connection, or it broke
            reason, wait = repr(error), 2.0**number
        else:
            if answer.status_code == 200:
                return answer.json()
            reason, wait = f"{answer.status_code}: {answer.text}", 2.0**number
            if answer.status_code not in AGAIN:
                break
            wait = float(answer.headers.get("Retry-After", wait))
        await asyncio.sleep(wait)
    raise RuntimeError(f"the service has not answered: {reason}")


async def ask_all(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Each text with its answer, in the order of the file."""
    texts = [line for line in args.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    parts = [texts[i : i + args.per_request] for i in range(0, len(texts), args.per_request)]
    more = {} if args.max_exit is None else {"max_exit": args.max_exit}
    free = asyncio.Semaphore(args.at_once)
    async with httpx.AsyncClient(base_url=args.url, timeout=60) as client:

        async def one(part: list[str]) -> Any:
            async with free:
                return await ask(client, {"inputs": part, **more}, args.tries)

        found = await asyncio.gather(*map(one, parts))
    answers: list[Any] = []
    for said in found:  # a list; of a service of many tasks a list for each task
        if isinstance(said, dict):
            answers += [dict(zip(said, row, strict=True)) for row in zip(*said.values(), strict=True)]
        else:
            answers += said
    return list(zip(texts, answers, strict=True))


def main() -> None:
    """Prints one line of JSON per text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("file", type=Path, help="one text per line")
    parser.add_argument("--per-request", type=int, default=32, help="texts of a request")
    parser.add_argument("--at-once", type=int, default=4, help="requests on their way")
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--max-exit", type=int, help="no text goes past this block")
    try:
        found = asyncio.run(ask_all(parser.parse_args()))
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    for text, answer in found:
        print(json.dumps({"text": text, **answer}, ensure_ascii=False))


if __name__ == "__main__":
    main()
