"""The simulation against what `benchmarks/serve.py` has measured: the same requests at the same moments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from badge_peft import EarlyExitConfig
from capacity_parts.fleet import simulate
from capacity_parts.measure import FULL
from capacity_parts.plan import Plan, governed
from capacity_parts.service import Outcome, Service
from capacity_parts.traffic import Traffic

_LONGEST = 60.0  # seconds that the client of the load test waits


def check(measured: dict[str, Any], load_test: dict[str, Any], batch_size: int, batch_wait: float) -> dict[str, Any]:
    """Simulates every run of the load test.

    One number is taken from it: how much longer a replica takes that shares its machine with HTTP, the client and
    other replicas, from what it answered at full depth at most. All else is predicted.

    Args:
        measured: From `measure`, of the same adapter.
        load_test: What `benchmarks/serve.py` has written.
        batch_size: Texts of a batch, in the load test.
        batch_wait: Seconds, in the load test.

    Returns:
        `slowness`, and of each run its quantiles of the latency in seconds, measured and simulated.
    """
    size = load_test["size"]
    empty = load_test["overhead"]["the empty deployment"]["p50"] / 1000
    plan = Plan(measured, target=load_test["target"], request_rows=size, overhead=(empty,))
    ways = plan.ways()
    make = governed(EarlyExitConfig.of(measured["early_exit"]), load_test["target"], load_test["max_score_drop"])
    fixed = ways["fixed exits"]
    served = {"stock": ways[FULL], "fixed": fixed, "controller": replace(fixed, governor=make)}
    served = {n: replace(s, batch_size=batch_size, batch_wait=batch_wait) for n, s in served.items()}
    stock = served["stock"]
    full = np.full(stock.batch_requests * size, measured["depth"])
    slowness = len(full) / stock.times.mean(full) / load_test["capacity"]["stock"]["texts_per_second"]
    rows = []
    for name, runs in load_test["runs"].items():
        for way, requests in runs.items():
            found = quantiles(_simulated(served[way], slowness, requests))
            rows.append({"traffic": name, "way": way, "measured": _measured(requests), "simulated": found})
    return {"slowness": slowness, "runs": rows}


def _simulated(service: Service, slowness: float, requests: list[list[float]]) -> Outcome:
    moments = np.sort([at for at, *_ in requests])
    traffic = Traffic("recorded", float(moments[-1]), np.ones_like, recorded=moments, grace=_LONGEST)
    return simulate(service, [slowness], traffic, 0.0)


def _measured(requests: list[list[float]]) -> dict[str, float]:
    """Requests without an answer count as infinitely slow."""
    answered = np.array([seconds for _, _, seconds, status, *_ in requests if status == 200])
    return quantiles(Outcome(answered, answered, len(requests) - len(answered), 0, 0.0))


def quantiles(outcome: Outcome) -> dict[str, float]:
    """By name."""
    return {f"p{percent}": outcome.quantile(percent / 100) for percent in (50, 95, 99)}
