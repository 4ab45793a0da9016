"""The experiments of `latency.py`, each on one shape: what exits cost when nobody leaves, and what leaving saves,
against the same model without exits in the same runtime."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from common import quartiles

from badge_peft import EarlyExitConfig
from badge_peft.evaluation import measure_latency
from badge_peft.evaluation.costs import measure_costs
from badge_peft.model import get_badge_model
from latency_parts.forced import NOBODY, RULE, Forced, even_exits, exits_of
from latency_parts.sessions import Sessions, to_numpy
from latency_parts.turns import Call, Timing, against_base

STOCK = "stock PyTorch"
PLAIN = "plain ONNX export"
PLAIN_INT8 = "plain int8 ONNX export"
ALL_EXITS = "full depth, all exits"
NONE_TAKEN = "early exit, nobody leaves"
NEVER = "policy never"
DGE = "leaves by DGE"
FIXED = "leaves at a fixed depth"
MIXED = "each row leaves on its own"
TOGETHER = "the batch leaves together"
EXPECTED = "each row leaves on its own, measured over expected"
HALF_WAY = "ONNX Runtime int8, leaves half-way"
_EXPECTED = 24  # rows
_PAUSE = 0.01  # seconds between two runtimes

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A call, where its rows [B] should leave (None: it has no exits), whether the ratio is to the base's whole time
    and not to the share of the blocks that ran, and whether it is looked at where the rows leave."""

    variant: str
    call: Call
    wanted: Sequence[int] | None
    whole: bool = False
    checked: bool = True


@dataclass(frozen=True)
class Bench:
    """One model on one device, and how often everything takes its turn."""

    forced: Forced
    sessions: Sessions
    device: str
    rounds: int

    @property
    def last(self) -> int:
        return self.forced.size.blocks

    def batch(self, exits: Sequence[int], length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        return {name: x.to(self.device) for name, x in self.forced.batch(exits, length, seed).items()}

    def torch_rows(self, cases: Sequence[Case], batch: dict[str, Any]) -> list[Row]:
        """Cases against the stock model."""
        base = partial(self.forced.stock, **batch)
        outside = partial(self.forced.outside, **batch)
        return self.rows(cases, batch, STOCK, base, outside=outside, device=self.device)

    def onnx_rows(self, cases: Sequence[Case], batch: dict[str, Any], int8: bool = False) -> list[Row]:
        """Cases against the plain export."""
        plain = self.sessions.plain(int8)
        outside = self.sessions.plain(int8, blocks=False)
        name = PLAIN_INT8 if int8 else PLAIN
        return self.rows(
            cases, batch, name, partial(plain, **to_numpy(batch)), outside=partial(outside, **to_numpy(batch))
        )

    def rows(self, cases: Sequence[Case], batch: dict[str, Any], base: str, call: Call, **options: Any) -> list[Row]:
        """One line of the results for each case."""
        count, length = batch["input_ids"].shape
        with torch.inference_mode():
            left = [exits_of(case.call()) if case.wanted and case.checked else case.wanted for case in cases]
            timed = against_base(
                call,
                {str(i): case.call for i, case in enumerate(cases)},
                self.rounds,
                **options,
            )
        return [
            {"base": base, "batch": count, "length": length, **row_of(case, found, timing, self.last)}
            for case, found, timing in zip(cases, left, timed.values(), strict=True)
        ]


def row_of(case: Case, left: Sequence[int] | None, timing: Timing, blocks: int) -> Row:
    """What is stored of a case; `share` is what the ratio divides the base's time by: mean exit / M."""
    mean = statistics.fmean(left) if left else float(blocks)
    share = 1.0 if case.whole else mean / blocks
    return {
        "variant": case.variant,
        "forced": sorted(set(case.wanted)) if case.wanted else None,
        "as_forced": list(case.wanted) == list(left) if case.wanted and left else None,
        "mean_exit": mean,
        "blocks": blocks,
        "share": share,
        **timing.summary(share),
    }


def full_depth(bench: Bench, count: int, length: int) -> list[Row]:
    """Every exit is computed and nobody leaves; with `never` none is computed."""
    batch = bench.batch([bench.last] * count, length)
    model = bench.forced.model
    early = partial(model.early_exit_forward, **batch, **NOBODY)
    cases = [
        Case(
            ALL_EXITS,
            partial(model, **batch),
            None,
            True,
        ),
        Case(NONE_TAKEN, early, [bench.last] * count, True),
        Case(NEVER, partial(model.early_exit_forward, **batch, policy="never"), [bench.last] * count, True),
    ]
    return bench.torch_rows(cases, batch)


def exits(bench: Bench, count: int, length: int) -> list[Row]:
    """Rows leave at block k, by DGE (which cannot stop before block 2) and by `fixed_depth`."""
    cases = []
    for k in range(1, bench.last + 1):
        early = partial(bench.forced.model.early_exit_forward, **bench.batch([max(k, 2)] * count, length, seed=k))
        if k > 1:
            cases.append(Case(DGE, partial(early, **RULE), [k] * count))
        cases.append(Case(FIXED, partial(early, policy="fixed_depth", depth=k), [k] * count))
    return bench.torch_rows(cases, bench.batch([bench.last] * count, length))


def batches(bench: Bench, count: int, length: int) -> list[Row]:
    """Rows of a batch leave at blocks 2 to M. Beside it what libraries do that stop when the whole batch agrees: the
    same model, all rows until the last one leaves."""
    wanted = even_exits(count, bench.last)
    batch = bench.batch(wanted, length)
    early = partial(bench.forced.model.early_exit_forward, **batch)
    mixed = Case(MIXED, partial(early, **RULE), wanted)
    together = partial(early, policy="fixed_depth", depth=max(wanted))  # the rows need the same mean depth
    return bench.torch_rows([mixed, Case(TOGETHER, together, wanted, checked=False)], batch)


def onnx_exits(bench: Bench, count: int, length: int, int8: bool = False) -> list[Row]:
    """Rows leave at block k."""
    early, cases = bench.sessions.early(int8), []
    for k in range(2, bench.last + 1):
        inputs = to_numpy(bench.batch([k] * count, length, seed=k))
        cases.append(Case(DGE, partial(early, **inputs), [k] * count))
    return bench.onnx_rows(cases, bench.batch([bench.last] * count, length), int8)


def onnx_batches(bench: Bench, count: int, length: int) -> list[Row]:
    """Rows of a batch leave at blocks 2 to M."""
    wanted = even_exits(count, bench.last)
    batch = bench.batch(wanted, length)
    return bench.onnx_rows([Case(MIXED, partial(bench.sessions.early(), **to_numpy(batch)), wanted)], batch)


def int8_against_stock(bench: Bench, count: int, length: int) -> list[Row]:
    """Against stock PyTorch at full depth: the int8 file leaving at block M/2, and the plain int8 file, call after
    call as in a service. `times_faster` is the quotient."""
    half = [max(2, bench.last // 2)] * count
    batch = bench.batch(half, length)
    stock = partial(bench.forced.stock, **batch)
    inputs = to_numpy(batch)
    call = partial(bench.sessions.early(int8=True), **inputs)
    warm = [
        Case(HALF_WAY, call, half, True),
        Case(PLAIN_INT8, partial(bench.sessions.plain(True), **inputs), None, True),
    ]
    rows = bench.rows(warm, batch, STOCK, stock, pause=_PAUSE, settle=True)
    return [{**row, "times_faster": 1 / row["ratio"]} for row in rows]


def expected(bench: Bench, count: int, length: int) -> list[Row]:
    """Rows leave at blocks 2 to M, one at a time: their time over what the cost model of `calibrate` expects."""
    model, last = bench.forced.model, bench.last
    wanted = even_exits(_EXPECTED, last)
    rows = [{k: v[0] for k, v in bench.batch([k], length, seed=i).items()} for i, k in enumerate(wanted)]
    report = measure_latency(model, rows, RULE, repeats=bench.rounds)
    costs = measure_costs(model, rows, count, seconds=5.0)
    numbers = get_badge_model(model).exit_layers()
    by_exit = dict(zip(numbers, costs.milliseconds(EarlyExitConfig(**RULE), numbers, last), strict=True))
    means = np.array([by_exit[k] for k in report.exit_layer])
    low, _, high = quartiles(np.array(report.times_ms) / means)
    row = {
        "base": STOCK,
        "batch": count,
        "length": length,
        "variant": EXPECTED,
        "forced": sorted(set(wanted)),
        "as_forced": wanted == report.exit_layer,
        "mean_exit": report.mean_exit,
        "blocks": last,
        "ratio": report.mean_ms / float(means.mean()),
        "ratio_q1": low,
        "ratio_q3": high,
        "p50_ms": report.p50_ms,
        "p95_ms": report.p95_ms,
        "base_p50_ms": report.full_depth_p50_ms,
        "base_p95_ms": report.full_depth_p95_ms,
        "time_saved": report.time_saved,
        "expected_time_saved": 1 - float(means.mean()) / costs.full_ms,
        "rounds": bench.rounds,
    }
    return [row]


RUNS: dict[str, Callable[[Bench, int, int], list[Row]]] = {
    "full-depth": full_depth,
    "exits": exits,
    "batch": batches,
    "onnx": onnx_exits,
    "onnx-int8": partial(onnx_exits, int8=True),
    "onnx-batch": onnx_batches,
    "int8-vs-stock": int8_against_stock,
    "expected": expected,
}
