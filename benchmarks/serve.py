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
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from latency_parts.environment import describe
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the services end, too
    file = Path(options.json)
    data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if options.docs:
        write_page(data, Path(options.docs))
        return 0
    if options.texts is None:
        raise SystemExit("give ADAPTER and TEXTS, or --docs")
    texts, labels = read(options.texts)
    command = "python benchmarks/serve.py ADAPTER TEXTS.jsonl " + _said(options)
    if options.kills:
        measured = measure_kills(texts, options)
    elif options.overhead:
        measured = measure_overhead(texts, options)
    else:
        measured = measure_load(texts, labels, options)
    for found in measured:
        if "kills" in found and "kills" in data:
            found = {"kills": kills.together([data["kills"], found["kills"]])}
        data |= found
        data["commands"] = sorted({*data.get("commands", []), command.strip()})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data))
    return 0


def read(path: str) -> tuple[list[str], list[str]]:
    """Texts and the names of their labels."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [line["text"] for line in lines], [str(line["label"]) for line in lines]


def measure_load(texts: list[str], labels: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything but the kills, as it comes."""
    names = ("target", "max_score_drop", "size", "price", "scale")
    yield {"environment": describe(1, "cpu"), "adapter": options.about, **{n: getattr(options, n) for n in names}}
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
        yield {"capacity": capacity}
        stock = capacity["stock"]["texts_per_second"]
        for name, traffic in shapes(options.scale).items():
            times = arrivals(traffic, stock, options.size, options.seed)
            for way in WAYS:
                use(way)
                start = perf_counter()
                sent = play(service.url, requests, times)
                runs.setdefault(name, {})[way] = [stored(one, gold) for one in sent]
                print(f"{name}, {way}: {len(sent)} requests, {perf_counter() - start:.0f} s", flush=True)
            yield {"runs": runs}


def answers_of(sent: list[Sent], count: int) -> list[dict[str, Any] | None]:
    """By place of the text."""
    found: list[dict[str, Any] | None] = [None] * count
    for request in sent:
        for place, answer in zip(request.rows, request.answers, strict=True):
            found[place] = answer
    return found


def saturated(service: Running, requests: Any, seconds: float) -> dict[str, float]:
    """What the service answers at most, and the processor time of its replica."""
    start, cpu = perf_counter(), service.cpu_seconds()
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


def measure_overhead(texts: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One text at a time, all ways in turn."""
    where = {"overhead_environment": describe(1, "cpu")}
    rounds, each = max(round(8 * options.scale), 1), 25
    for found in overhead.measure(options.adapter, texts, rounds, each, 8 * options.scale, Path(options.log)):
        print({name: round(own["p50"], 1) for name, own in found["overhead"].items()}, found["most"], flush=True)
        yield {**where, **found}


def measure_kills(texts: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """On a service of its own."""
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
            options.connections,
            options.pause,
            limit=60 * options.minutes,
        )
        print(found)
        yield {"kills": {**found, "replicas": options.replicas}}


def write_page(data: dict[str, Any], path: Path) -> None:
    """The page, and its pictures beside it."""
    traffic, target = shapes(data["scale"]), data["target"]
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, title in (("bursts", "Bursts of twice the stock model's capacity"), ("day", "A day in a minute")):
        if name not in data["runs"]:
            continue
        picture(data["runs"][name], target, title, folder / f"{name}.png")
        pictures[name] = f"{folder.name}/{name}.png"

    def busy(name: str, second: float) -> bool:
        part = traffic[name].busy
        return part is not None and part(second)

    path.write_text(page(data, busy, pictures), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?")
    parser.add_argument("texts", nargs="?")
    parser.add_argument("--about", default="", help="what the page says of the adapter")
    parser.add_argument("--target", type=float, default=0.5, help="seconds that the p95 is kept below")
    parser.add_argument("--max-score-drop", type=float, default=0.01)
    parser.add_argument("--size", type=int, default=8, help="texts of a request")
    parser.add_argument("--price", type=float, default=0.1, help="dollars that the machine costs in an hour")
    parser.add_argument("--scale", type=float, default=1.0, help="of all durations; 0.1 tries the program")
    parser.add_argument(
        "--kills", type=int, default=0, help="so many, and measure nothing else; added to earlier runs"
    )
    parser.add_argument("--overhead", action="store_true", help="one text at a time, and measure nothing else")
    parser.add_argument("--replicas", type=int, default=2, help="with --kills")
    parser.add_argument("--connections", type=int, default=4, help="with --kills")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two kills, with all replicas there")
    parser.add_argument("--minutes", type=float, default=10.0, help="with --kills: no longer than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", default="runs/serve.log", help="output of the services")
    parser.add_argument("--json", default="runs/serve.json", help="the file of the results")
    parser.add_argument("--docs", metavar="FILE", help="measure nothing: write the page from the file")
    return parser


def _said(options: argparse.Namespace) -> str:
    """The options that differ from their defaults, but those of places."""
    parser = _parser()
    names = [
        name for name in vars(options) if name not in ("adapter", "texts", "about", "log", "json", "docs", "minutes")
    ]
    given = [name for name in names if getattr(options, name) != parser.get_default(name)]
    values = {name: getattr(options, name) for name in given}
    return " ".join(f"--{n.replace('_', '-')}" + ("" if v is True else f" {v}") for n, v in values.items())


if __name__ == "__main__":
    raise SystemExit(main())
