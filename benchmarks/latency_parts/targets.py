"""What early exits should cost at most on the CPU, and whether the measured rows reached it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from latency_parts.runs import ALL_EXITS, DGE, EXPECTED, HALF_WAY, MIXED, NEVER

REACHED = "reached"
MISSED = "missed"
OPEN = "not measured"
_SIZES = ("BERT-base", "h384")


class Target(NamedTuple):
    """A bound on `value` of the rows of an experiment that have this variant, one of these lengths (none: all), this
    batch and, leaving alone, one of these exits (first, last); at most, or at least."""

    what: str
    experiment: str
    size: str
    bound: float
    variant: str | None = None
    lengths: tuple[int, ...] = ()
    batch: int = 1
    exits: tuple[int, int] | None = None
    value: str = "ratio"
    at_least: bool = False

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the bound is on this row."""
        if self.exits and not self.exits[0] <= min(row["forced"] or [0]) <= self.exits[1]:
            return False
        of_length = not self.lengths or row["length"] in self.lengths
        return self.variant in (None, row["variant"]) and of_length and row["batch"] == self.batch


class Verdict(NamedTuple):
    """What became of a target: the row that is furthest from it, and how many rows it is on and are missed."""

    target: Target
    status: str
    worst: Mapping[str, Any]
    of: int = 0
    missed: int = 0


def judge(target: Target, sections: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Compares a target with the stored rows; a row whose exits were not those wanted counts as a miss."""
    section = sections.get(f"{target.experiment}/{target.size}/cpu", {})
    rows: Sequence[Mapping[str, Any]] = [row for row in section.get("rows", []) if target.fits(row)]
    if not rows:
        return Verdict(target, OPEN, {})
    sign = -1 if target.at_least else 1
    missed = sum(sign * r[target.value] > sign * target.bound or r.get("as_forced") is False for r in rows)
    worst = max(rows, key=lambda row: sign * row[target.value])
    return Verdict(target, MISSED if missed else REACHED, worst, len(rows), missed)


def _leaving(what: str, experiment: str, size: str, bound: float, first: int, last: int, *lengths: int) -> Target:
    blocks = f"block {first}" if first == last else f"block {first} on"
    what = f"{what}, leaving at {blocks}, {', '.join(map(str, lengths))} tokens"
    return Target(what, experiment, size, bound, DGE, lengths, exits=(first, last))


def _full(size: str, *bounds: tuple[int, float]) -> list[Target]:
    what = "full depth with all exits, {} tokens"
    return [Target(what.format(s), "full-depth", size, bound, ALL_EXITS, (s,)) for s, bound in bounds]


TARGETS = [
    *_full("BERT-base", (128, 1.02), (64, 1.03), (16, 1.06)),
    *_full("h384", (128, 1.05), (64, 1.07), (16, 1.12)),
    *(Target("policy never, 16 to 128 tokens", "full-depth", size, 1.02, NEVER) for size in _SIZES),
    _leaving("PyTorch", "exits", "BERT-base", 1.05, 2, 12, 64, 128),
    _leaving("PyTorch", "exits", "BERT-base", 1.12, 2, 12, 16),
    _leaving("PyTorch", "exits", "h384", 1.12, 2, 12, 64, 128),
    _leaving("PyTorch", "exits", "h384", 1.25, 2, 12, 16),
    *(
        Target(
            "PyTorch, 32 mixed rows of 32 tokens",
            "batch",
            size,
            1.06,
            MIXED,
            (32,),
            32,
        )
        for size in _SIZES
    ),
    _leaving("ONNX Runtime", "onnx", "BERT-base", 1.00, 3, 12, 16, 64, 128),
    _leaving("ONNX Runtime", "onnx", "BERT-base", 1.05, 2, 2, 16, 64, 128),
    _leaving("ONNX Runtime", "onnx", "h384", 1.03, 3, 12, 64, 128),
    _leaving("ONNX Runtime", "onnx", "h384", 1.10, 2, 2, 64, 128),
    *(
        _leaving("ONNX Runtime int8", "onnx-int8", size, bound, first, last, 64, 128)
        for size in _SIZES
        for bound, first, last in ((1.03, 3, 12), (1.15, 2, 2))
    ),
    *(
        Target("ONNX Runtime, 32 mixed rows of 32 tokens", "onnx-batch", size, 1.10, MIXED, (32,), 32)
        for size in _SIZES
    ),
    Target(
        "ONNX Runtime int8 leaving at block 6, times faster than stock PyTorch, 64 tokens",
        "int8-vs-stock",
        "BERT-base",
        8.0,
        HALF_WAY,
        (64,),
        value="times_faster",
        at_least=True,
    ),
    *(
        _leaving(
            f"{what} against the limit",
            experiment,
            size,
            bound,
            2,
            12,
            *lengths,
        )._replace(value="limit_ratio")
        for what, experiment in (("PyTorch", "exits"), ("ONNX Runtime", "onnx"), ("ONNX Runtime int8", "onnx-int8"))
        for size, bound, lengths in (
            ("BERT-base", 1.03, (64, 128)),
            ("BERT-base", 1.06, (16,)),
            ("h384", 1.06, (16, 64, 128)),
        )
    ),
    *(
        Target(f"time over what is expected, {what}", "expected", size, bound, EXPECTED, at_least=at_least)
        for size in _SIZES
        for what, bound, at_least in (("at most", 1.1, False), ("at least", 0.9, True))
    ),
    *(Target("peak memory at 32 rows", "memory", size, 1.05, batch=32) for size in _SIZES),
]
