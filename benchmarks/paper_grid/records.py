"""What the store holds of a grid, in a form that tables can be made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paper_grid.plan import Run, plan
from paper_grid.rates import choose
from paper_grid.settings import Settings
from paper_grid.store import Store

Place = tuple[str, str, str]  # task, backbone, mode


@dataclass
class Record:
    """One finished run as planned, its settings with learning rates (from `search` or `default`), and its
    `run.json`."""

    run: Run
    settled: dict[str, Any]
    rates: str
    result: dict[str, Any]

    def __post_init__(self) -> None:
        s = self.settled
        self.place: Place = (s["task"], s["backbone"], s["mode"])
        self.method = s["method"]
        self.variant = s["variant"]
        self.seed = s["seed"]

    def score(self, what: str) -> float:
        """`avg`, `best` or `final` on the test split, in per cent."""
        return 100 * float(self.result["scores"]["test"][what])


def gather(settings: Settings, store: Store) -> tuple[list[Record], list[tuple[Run, str]]]:
    """The finished runs of a grid, and the missing ones with the source of the rates that they would have."""
    found, missing = [], []
    for run in plan(settings):
        settled, source = choose(settings, run, store)
        result = store.read(settled)
        if result is None:
            missing.append((run, source))
        else:
            found.append(Record(run, settled, source, result))
    return found, missing


def places(records: list[Record]) -> list[Place]:
    """Tasks with backbones and modes, in the order of the grid."""
    return list(dict.fromkeys(record.place for record in records))


def by_seed(records: list[Record], keep: Callable[[Record], bool], what: str) -> dict[int, float]:
    """Seed -> test score of the runs that `keep` picks."""
    return {record.seed: record.score(what) for record in records if keep(record)}


def method_scores(records: list[Record], place: Place, row: str, what: str) -> dict[int, float]:
    """Seed -> score of one row of Table 1. `single_exits` needs one run per depth: its S-avg is their mean, its S-best
    the best of them; a seed with a missing depth is left out."""
    if row not in ("single_final", "single_exits"):
        return variant_scores(records, place, {}, what, row)
    singles = [r for r in records if r.place == place and r.method == "single" and not r.variant]
    found: dict[int, float] = {}
    for seed in sorted({r.seed for r in singles}):
        mine = {r.settled["depth"]: r.score("final") for r in singles if r.seed == seed}
        blocks = singles[0].settled["blocks"]
        if row == "single_final":
            if blocks in mine:
                found[seed] = mine[blocks]
        elif len(mine) == blocks:
            found[seed] = sum(mine.values()) / blocks if what == "avg" else max(mine.values())
    return found


def variant_scores(
    records: list[Record], place: Place, variant: dict[str, Any], what: str, method: str = "badge"
) -> dict[int, float]:
    """Seed -> score of one variant of a method."""
    return by_seed(records, lambda r: r.place == place and r.method == method and r.variant == variant, what)
