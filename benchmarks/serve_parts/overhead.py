"""What the service takes by itself: one text at a time, at full depth, way after way in many short rounds, so that
whatever else the machine does meets all ways alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
from common import markdown, verdict

from serve_parts.client import bodies, saturate
from serve_parts.service import Running, serve_command

BARE = "the model, in one process"
PAUSED = "the same, each text after a pause"
EMPTY = "the empty deployment"
SERVICE = "the service"
DEPTH = ", full depth"
BEHIND = " behind HAProxy"
_PAUSE = 0.015  # seconds, about what HTTP and Ray take between two passes of the service
_EMPTY = str(Path(__file__).with_name("empty.py"))
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"

Ask = Callable[[str], dict[str, float]]


def measure(
    adapter: str, texts: Sequence[str], rounds: int, each: int, seconds: float, log: Path
) -> Iterator[dict[str, Any]]:
    """The ways of each proxy side by side, `each` texts a turn, and how many texts its service answers in some seconds
    in which as many are sent as are answered.

    Returns:
        `ways`: of each way quantiles in milliseconds (`p50`, `p95`), and medians of what `Server-Timing` says and of
        the processor's milliseconds; `most`: by proxy, texts per second at the adapter's own setting.
    """
    found: dict[str, list[dict[str, float]]] = {}
    most: dict[str, float] = {}
    model = bare(adapter)
    for behind in ("", BEHIND):
        environment = {_HAPROXY: "1" if behind else "0"}
        with ExitStack() as stack:
            empty = stack.enter_context(Running([_EMPTY], log.with_suffix(".empty"), environment))
            service = stack.enter_context(Running(serve_command(adapter), log, environment))
            own = service.change()["early_exit"]["default"]
            service.change(early_exit={"policy": "never"})
            ways = {
                BARE: model,
                PAUSED: paused(model),
                EMPTY + behind: asked(empty),
                SERVICE + behind + DEPTH: asked(service),
            }
            for name, taken in in_turn(ways, texts, rounds, each).items():
                found.setdefault(name, []).extend(taken)
            service.change(early_exit=own)
            most[behind.strip() or "Ray's own proxy"] = texts_per_second(service, texts, seconds)
        yield {"ways": {name: summary(taken) for name, taken in found.items()}, "most": most}


def in_turn(
    ways: Mapping[str, Ask], texts: Sequence[str], rounds: int, each: int
) -> dict[str, list[dict[str, float]]]:
    """Asks `each` texts of each way, `rounds` times; the first round is for warming up and counts nothing."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, ask in ways.items():
            start = number * each
            taken = [ask(texts[i % len(texts)]) for i in range(start, start + each)]
            found[name] += taken if number else []
    return found


def summary(taken: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Quantiles of the seconds, in milliseconds, and medians of all else."""
    ms = [1e3 * one["seconds"] for one in taken]
    others = {name: float(np.median([one[name] for one in taken])) for name in taken[0] if name != "seconds"}
    if "cpu" in others:  # the system counts it in steps
        others["cpu"] = float(np.mean([one["cpu"] for one in taken]))
    return {**{f"p{q}": float(np.quantile(ms, q / 100)) for q in (50, 95)}, **others}


def asked(service: Running) -> Ask:
    """One request, with what the service says of its time, and the processor's milliseconds of all its processes."""

    def ask(text: str) -> dict[str, float]:
        cpu = _cpu_seconds(service)
        start = perf_counter()
        answer = service.client.post("/predict", json={"inputs": [text]})
        seconds = perf_counter() - start
        answer.raise_for_status()
        said = ",".join(answer.headers.get_list("Server-Timing"))
        parts = dict(part.strip().split(";dur=") for part in said.split(",") if part)
        spent = 1e3 * (_cpu_seconds(service) - cpu)
        return {"seconds": seconds, "cpu": spent, **{name: float(value) for name, value in parts.items()}}

    return ask


def paused(ask: Ask) -> Ask:
    """With nothing to do before each text, while which others use the processor's caches."""

    def late(text: str) -> dict[str, float]:
        time.sleep(_PAUSE)
        return ask(text)

    return late


def bare(adapter: str) -> Ask:
    """The model in this process."""
    from badge_peft.early_exit.config import EarlyExitConfig
    from badge_peft.serving.engine import Engine
    from badge_peft.serving.settings import MAIN

    engine = Engine(adapter, threads=1)
    never = {MAIN: EarlyExitConfig(policy="never")}

    def ask(text: str) -> dict[str, float]:
        cpu = time.process_time()
        start = perf_counter()
        engine.predict([(text, None)], never)
        return {"seconds": perf_counter() - start, "cpu": 1e3 * (time.process_time() - cpu)}

    return ask


def texts_per_second(service: Running, texts: Sequence[str], seconds: float) -> float:
    """Of requests of one text, from 24 connections."""
    requests = bodies(texts, 1)
    saturate(service.url, requests, 24, seconds / 3)
    start = perf_counter()
    sent = saturate(service.url, requests, 24, seconds)
    return sum(one.status == 200 for one in sent) / (perf_counter() - start)


def _cpu_seconds(service: Running) -> float:
    """What the processes of the service have used, those that have ended left out."""
    found = 0.0
    for process in service.processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        found += times.user + times.system
    return found


def section(data: dict[str, Any]) -> list[str]:
    """Of the page: the table, and what of the difference is whose."""
    found = data["ways"]
    most = data["most"]
    where = data["environment"]
    columns = {"total": "in the replica", "body": "of it the body", "model": "the model"}
    head = ["one text at a time", "p50, ms", "p95, ms", *columns.values(), "processor, ms"]
    rows = []
    for name, own in found.items():
        parts = [f"{own[key]:.2f}" if key in own else "" for key in columns]
        rows.append([name, f"{own['p50']:.2f}", f"{own['p95']:.2f}", *parts, f"{own['cpu']:.1f}"])
    model = found[BARE]["p50"]
    late = found[PAUSED]["p50"]
    said = []
    for behind, proxy in (("", "Ray's own proxy"), (BEHIND, "HAProxy")):
        own = found[SERVICE + behind + DEPTH]
        empty = found[EMPTY + behind]["p50"]
        added = own["p50"] - model
        said.append(
            f"With {proxy} the service adds {added:.1f} ms at the median to the model's own time (the target was 3 "
            f"ms: {verdict(added <= 3)}). Of these HTTP, FastAPI and Ray Serve take {empty:.1f} ms "
            f"without a model; the model itself takes {late - model:.1f} ms longer after a pause, and "
            f"{own['model'] - late:.1f} ms more in the replica; until Ray has handed over the body the replica waits "
            f"{own['body']:.2f} ms, and what it does beside that and the model takes "
            f"{own['total'] - own['model'] - own['body']:.2f} ms."
        )
    speeds = ", ".join(f"{value:.0f} {name if name == BEHIND[1:] else f'with {name}'}" for name, value in most.items())
    return [
        markdown(head, rows),
        "",
        " ".join(said),
        "",
        "*In the replica*, *the body* and *the model* are of the header `Server-Timing`; *processor* is what all "
        "processes of the service use for a request. At the adapter's own setting, in requests of one text from 24 "
        f"connections, it answers texts per second: {speeds}. {where['date']}, load {where['load_1min']} at the "
        "start; turns of 25 texts, the ways of a proxy side by side.",
    ]
