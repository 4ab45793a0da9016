"""`badge-peft serve` under load: at full depth, at the adapter's own setting, and with a controller; replicas killed.

    python benchmarks/serve.py ADAPTER TEXTS.jsonl                # the load test, about 10 minutes
    python benchmarks/serve.py ADAPTER TEXTS.jsonl --kills 20     # the kills alone
    python benchmarks/serve.py ADAPTER TEXTS.jsonl --overhead     # what the service takes by itself, about 4 minutes
    python benchmarks/serve.py --docs docs/results/serving.md     # measures nothing: the page

ADAPTER is calibrated on other rows than TEXTS, whose lines are {"text": ..., "label": ...}. Needs
pip install 'badge-peft[serve,plots]' httpx, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from common import Results, describe, parser, read_lines, write_page
from serve_parts import kills, overhead
from serve_parts.client import Sent, bodies, play, saturate
from serve_parts.page import page, picture
from serve_parts.service import Running, serve_command
from serve_parts.traffic import arrivals, shapes

WAYS = ("stock", "fixed", "controller")
CONNECTIONS = 24  # that saturate the service
WARM = 5.0  # seconds in which the controller goes to its fastest setting


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    results = Results(options.json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the services end, too
    if options.docs:
        write_all(results, Path(options.docs))
        return 0
    lines = read_lines(options.texts)
    texts = [line["text"] for line in lines]
    labels = [str(line["label"]) for line in lines]
    if options.kills:
        measure_kills(texts, options, results)
    elif options.overhead:
        measure_overhead(texts, options, results)
    else:
        measure_load(texts, labels, options, results)
    return 0


def measure_load(texts: list[str], labels: list[str], options: argparse.Namespace, results: Results) -> None:
    """Everything but the kills and the overhead, kept as it comes."""
    names = ("target", "max_score_drop", "size", "scale")
    about = {"environment": describe(1), "adapter": options.about}
    results.keep("load", {**about, **{n: getattr(options, n) for n in names}})
    requests = bodies(texts, options.size)
    capacity: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    with Running(serve_command(options.adapter), Path(options.log)) as service:
        own = service.change()["early_exit"]["default"]
        settings: dict[str, dict[str, Any]] = {
            "stock": {"target": 0, "early_exit": {"policy": "never"}},
            "fixed": {"target": 0, "early_exit": own},
            "controller": {"target": options.target, "max_score_drop": options.max_score_drop},
        }

        def use(way: str) -> None:
            service.change(target=0)
            service.change(**settings[way])

        use("stock")
        saturate(service.url, requests, CONNECTIONS, 3 * options.scale)  # warm
        full = answers_of(saturate(service.url, requests, CONNECTIONS), len(texts))
        gold = {"labels": labels, "full": [None if a is None else a["label"] for a in full]}
        for way in ("stock", "fixed"):
            use(way)
            capacity[way] = saturated(service, requests, 8 * options.scale)
        service.change(target=1e-4, max_score_drop=options.max_score_drop)  # that no setting keeps: the fastest
        saturate(service.url, requests, CONNECTIONS, WARM)
        capacity["controller"] = saturated(service, requests, 8 * options.scale)
        print({way: round(own["texts_per_second"]) for way, own in capacity.items()}, flush=True)
        results.keep("capacity", capacity)
        stock = capacity["stock"]["texts_per_second"]
        for name, traffic in shapes(options.scale).items():
            times = arrivals(traffic, stock, options.size, options.seed)
            for way in WAYS:
                use(way)
                start = perf_counter()
                sent = play(service.url, requests, times)
                runs.setdefault(name, {})[way] = [stored(one, gold) for one in sent]
                print(f"{name}, {way}: {len(sent)} requests, {perf_counter() - start:.0f} s", flush=True)
            results.keep("runs", runs)


def answers_of(sent: list[Sent], count: int) -> list[dict[str, Any] | None]:
    """By place of the text."""
    found: list[dict[str, Any] | None] = [None] * count
    for request in sent:
        for place, answer in zip(request.rows, request.answers, strict=True):
            found[place] = answer
    return found


def saturated(service: Running, requests: Any, seconds: float) -> dict[str, float]:
    """What the service answers at most, and the processor time of its replica."""
    start = perf_counter()
    cpu = service.cpu_seconds()
    sent = saturate(service.url, requests, CONNECTIONS, seconds)
    texts = sum(len(request.rows) for request in sent if request.status == 200)
    taken = perf_counter() - start
    return {"texts_per_second": texts / taken, "cpu_ms": 1e3 * (service.cpu_seconds() - cpu) / texts}


def stored(request: Sent, gold: dict[str, list[str]]) -> list[float]:
    """A request as `page` reads it."""
    answers = request.answers
    places = request.rows if answers else []
    right, full_right = (
        sum(said == gold["labels"][i] for i, said in zip(places, names, strict=True))
        for names in ([a["label"] for a in answers], [gold["full"][i] for i in places])
    )
    blocks = sum(answer["exit_layer"] for answer in answers)
    times = [round(x, 5) for x in (request.at, request.lag, request.seconds)]
    return [*times, request.status, len(places), right, full_right, blocks]


def measure_overhead(texts: list[str], options: argparse.Namespace, results: Results) -> None:
    """One text at a time, all ways in turn."""
    where = {"environment": describe(1)}
    rounds = max(round(8 * options.scale), 1)
    each = 25
    for found in overhead.measure(options.adapter, texts, rounds, each, 8 * options.scale, Path(options.log)):
        print({name: round(own["p50"], 1) for name, own in found["ways"].items()}, found["most"], flush=True)
        results.keep("overhead", {**where, **found})


def measure_kills(texts: list[str], options: argparse.Namespace, results: Results) -> None:
    """On a service of its own; added to earlier runs."""
    requests = bodies(texts[: 200 * options.size], options.size)
    replicas = ("--replicas", str(options.replicas))
    with Running(serve_command(options.adapter, *replicas), Path(options.log)) as service:
        expected: Any = answers_of(saturate(service.url, requests, 4), len(texts))
        found = kills.measure(
            service,
            requests,
            expected,
            options.kills,
            options.replicas,
            options.pause,
            limit=60 * options.minutes,
        )
        print(found)
        results.keep("kills", kills.together([*([results["kills"]] if "kills" in results else []), found]))


def write_all(data: Results, path: Path) -> None:
    """The page, and its pictures beside it."""
    traffic = shapes(data["load"]["scale"])
    target = data["load"]["target"]
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, title in (("bursts", "Bursts of twice the stock model's capacity"), ("day", "A day in a minute")):
        picture(data["runs"][name], target, title, folder / f"{name}.png")
        pictures[name] = f"{folder.name}/{name}.png"
    write_page(page(data, traffic["bursts"].busy, pictures), path)


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__, "runs/serve.json")
    options.add_argument("adapter", nargs="?")
    options.add_argument("texts", nargs="?")
    options.add_argument("--about", default="", help="what the page says of the adapter")
    options.add_argument("--target", type=float, default=0.5, help="seconds that the p95 is kept below")
    options.add_argument("--max-score-drop", type=float, default=0.01)
    options.add_argument("--size", type=int, default=8, help="texts of a request")
    options.add_argument("--scale", type=float, default=1.0, help="of all durations; 0.1 tries the program")
    options.add_argument(
        "--kills", type=int, default=0, help="so many, and measure nothing else; added to earlier runs"
    )
    options.add_argument("--overhead", action="store_true", help="one text at a time, and measure nothing else")
    options.add_argument("--replicas", type=int, default=2, help="with --kills")
    options.add_argument("--pause", type=float, default=2.0, help="seconds between two kills, with all replicas there")
    options.add_argument("--minutes", type=float, default=10.0, help="with --kills: no longer than this")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--log", default="runs/serve.log", help="output of the services")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
