"""What early exits should cost at most, in one table, and whether the measured rows reached it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from latency_parts.onnx_runs import HALF_WAY
from latency_parts.torch_runs import ALL_EXITS, DGE, MIXED

REACHED, MISSED, OPEN = "reached", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """A bound on the medians of some rows, on the CPU.

    Args:
        what: In words.
        experiment: Which one measures it.
        size: Name of the model's size.
        bound: At most this; with `at_least`, at least.
        variant: Of the rows; None takes all.
        lengths: S of the rows; None takes all.
        batch: B of the rows; None takes all.
        exits: First and last block at which the rows leave; None takes all.
        value: The field of a row that is bounded.
        at_least: See `bound`.
    """

    what: str
    experiment: str
    size: str
    bound: float
    variant: str | None = None
    lengths: tuple[int, ...] | None = None
    batch: int | None = None
    exits: tuple[int, int] | None = None
    value: str = "ratio"
    at_least: bool = False

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the bound is on this row."""
        if self.exits is not None:
            forced = row.get("forced") or []
            if len(forced) != 1 or not self.exits[0] <= forced[0] <= self.exits[1]:
                return False
        return (
            (self.variant is None or row["variant"] == self.variant)
            and (self.lengths is None or row["length"] in self.lengths)
            and (self.batch is None or row["batch"] == self.batch)
        )


@dataclass(frozen=True)
class Verdict:
    """What became of a target.

    Args:
        target: It.
        status: `reached`, `missed` or `not measured`.
        worst: The row that is furthest from it (or closest to missing it).
        of: How many rows it is on.
        missed: How many of them miss it.
    """

    target: Target
    status: str
    worst: Mapping[str, Any] | None = None
    of: int = 0
    missed: list[Mapping[str, Any]] = field(default_factory=list)


def judge(target: Target, sections: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Compares a target with the rows that are stored; a row whose exits were not those wanted counts as a miss.

    Args:
        target: One of `TARGETS`.
        sections: `experiment/size/device` to what was stored, with its `rows`.
    """
    section = sections.get(f"{target.experiment}/{target.size}/cpu")
    rows = [row for row in (section or {}).get("rows", []) if target.fits(row)]
    if not rows:
        return Verdict(target, OPEN)
    sign = -1 if target.at_least else 1
    worst = max(rows, key=lambda row: sign * row[target.value])
    missed = [r for r in rows if sign * r[target.value] > sign * target.bound or r.get("as_forced") is False]
    return Verdict(target, MISSED if missed else REACHED, worst, len(rows), missed)


def judge_all(sections: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """All targets."""
    return [judge(target, sections) for target in TARGETS]


_LONG = (64, 128)


def _full(size: str, bounds: dict[int, float]) -> list[Target]:
    return [
        Target(f"full depth with all exits, {s} tokens", "full-depth", size, bound, ALL_EXITS, (s,))
        for s, bound in bounds.items()
    ]


def _leave(what: str, experiment: str, size: str, bound: float, first: int, last: int, *lengths: int) -> Target:
    blocks = f"block {first}" if first == last else f"block {first} on"
    tokens = ", ".join(map(str, lengths))
    return Target(
        f"{what}, leaving at {blocks}, {tokens} tokens", experiment, size, bound, DGE, lengths, exits=(first, last)
    )


def _limit(what: str, experiment: str, size: str, bound: float, *lengths: int) -> Target:
    target = _leave(f"{what} against the limit", experiment, size, bound, 2, 12, *lengths)
    return replace(target, value="limit_ratio")


_LIMITS = [
    limit
    for what, experiment in (("PyTorch", "exits"), ("ONNX Runtime", "onnx"), ("ONNX Runtime int8", "onnx-int8"))
    for limit in (
        _limit(what, experiment, "BERT-base", 1.03, *_LONG),
        _limit(what, experiment, "BERT-base", 1.06, 16),
        _limit(what, experiment, "h384", 1.06, 16, *_LONG),
    )
]

TARGETS = [
    *_full("BERT-base", {128: 1.02, 64: 1.03, 16: 1.06}),
    *_full("h384", {128: 1.05, 64: 1.07, 16: 1.12}),
    _leave("PyTorch", "exits", "BERT-base", 1.05, 2, 12, *_LONG),
    _leave("PyTorch", "exits", "BERT-base", 1.12, 2, 12, 16),
    _leave("PyTorch", "exits", "h384", 1.12, 2, 12, *_LONG),
    _leave("PyTorch", "exits", "h384", 1.25, 2, 12, 16),
    Target("PyTorch, 32 mixed rows of 32 tokens", "batch", "BERT-base", 1.06, MIXED, (32,), 32),
    Target("PyTorch, 32 mixed rows of 32 tokens", "batch", "h384", 1.06, MIXED, (32,), 32),
    _leave("ONNX Runtime", "onnx", "BERT-base", 1.00, 3, 12, 16, *_LONG),
    _leave("ONNX Runtime", "onnx", "BERT-base", 1.05, 2, 2, 16, *_LONG),
    _leave("ONNX Runtime", "onnx", "h384", 1.03, 3, 12, *_LONG),
    _leave("ONNX Runtime", "onnx", "h384", 1.10, 2, 2, *_LONG),
    *(
        _leave("ONNX Runtime int8", "onnx-int8", size, bound, *blocks, *_LONG)
        for size in ("BERT-base", "h384")
        for bound, blocks in ((1.03, (3, 12)), (1.15, (2, 2)))
    ),
    *(
        Target("ONNX Runtime, 32 mixed rows of 32 tokens", "onnx-batch", size, 1.10, MIXED, (32,), 32)
        for size in ("BERT-base", "h384")
    ),
    Target(
        "ONNX Runtime int8 leaving at block 6, times faster than stock PyTorch, 64 tokens",
        "int8-vs-stock",
        "BERT-base",
        8.0,
        HALF_WAY,
        lengths=(64,),
        value="times_faster",
        at_least=True,
    ),
    *_LIMITS,
    *(Target("peak memory at 32 rows", "memory", size, 1.05, batch=32) for size in ("BERT-base", "h384")),
]
