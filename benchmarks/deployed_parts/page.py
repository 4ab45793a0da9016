"""docs/results/deployed.md from the records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import Results, machine, markdown, verdict

Record = dict[str, Any]
STOCK, EARLY = "stock PyTorch", "BADGE PyTorch"
LADDER = (STOCK, EARLY, "ONNX Runtime, full depth", "BADGE ONNX", "ONNX Runtime int8, full depth", "BADGE ONNX int8")
INTENTS = ("banking77", "clinc150")
PICTURE = "../img/deployed.svg"  # as seen from the page
WORTH, WORTH_INTENT, INT8, SLOWER = 0.5, 0.7, 2.0, 0.02  # the targets


@dataclass(frozen=True)
class Found:
    """All records of a classifier.

    Args:
        task: Name of the task.
        title: Of task and backbone.
        adapters: Of the adapters that no option shaped, by seed.
        clocks: Their times, by seed.
        others: `plain0`, `rivals` and `linear`, where they are there.
        machines: Where any of it was measured.
    """

    task: str
    title: str
    adapters: list[Record]
    clocks: list[Record]
    others: dict[str, Record]
    machines: frozenset[str] = frozenset()

    def saved(self, way: str = "one", stock: str = STOCK, early: str = EARLY) -> list[float]:
        """The share of the time that early exits save, by seed."""
        return [1 - own[way][early] / own[way][stock] for own in self.clocks]

    @property
    def int8(self) -> list[float]:
        """How many times faster early exits are in int8, by seed."""
        return [own["one"][LADDER[4]] / own["one"][LADDER[5]] for own in self.clocks]

    def early(self, drop: str, name: str) -> list[float]:
        """Of early answers at an allowed drop, by seed."""
        return [own["drops"][drop][name] for own in self.adapters]


def read_found(results: Results, classifiers: Iterable[Any]) -> list[Found]:
    """What there is, of each classifier that has adapters; a record is kept as `name/kind`."""
    found = []
    for it in classifiers:
        own = results.below(it.name)
        adapters, clocks = ([own[key] for key in sorted(own) if key.startswith(kind)] for kind in ("default", "clock"))
        if adapters:
            title = f"{it.own['title']}, {it.backbone}"
            others = {key: own[key] for key in ("plain0", "rivals", "linear") if key in own}
            machines = frozenset(machine(record["where"]) for record in own.values())
            found.append(Found(it.task, title, adapters, clocks, others, machines))
    return found


def page(found: Sequence[Found]) -> str:
    """The page."""
    seeds = sorted({len(own.adapters) for own in found})
    counts = " or ".join(map(str, seeds)) + (" seed" if seeds == [1] else " seeds")
    timed = [own for own in found if own.clocks]
    return f"""# Classifiers in service, before and after

Classifiers that plain `transformers.Trainer` fine-tuned, then `badge-peft train MODEL DATA` without an option. The
policy is calibrated on the validation rows; all scores and times are of test rows. {_targets(timed)}

{_headline(found)}

The drop of at most one point is allowed to the policy on new rows; `model` is the classifier's own score. Times are
measured, the model without exits and with them in turn; a batch has 32 texts. Values are
means over {counts} of the exits, with the range where there are several.

## Milliseconds per text

One text at a time; early answers next to the same runtime at full depth.

{_ladder(timed)}{_picture(timed)}

## At most half a point

{_half(found)}

## What else could be done

Of the same rows: the fixed depth that keeps the score on validation rows; the plain form of the paper (linear exits on
the first token behind a bypass, divergence-based exiting); the first blocks of the model fine-tuned alike; a linear
model on tf-idf. Scores on test rows, and what is saved: of fixed depth and the plain form blocks, of the first blocks
the time of the call in PyTorch.

{_rivals(found)}

## Exits

Scores of all exits on test rows, all rows answered there (seed 0).

{_exits(found)}

Made by

```bash
python benchmarks/deployed.py finetune --students --data-dir DATA --model-dir MODELS
python benchmarks/deployed.py exits --data-dir DATA
python benchmarks/deployed.py clock --data-dir DATA
python benchmarks/deployed.py page --docs docs/results/deployed.md
```

On {". On ".join(sorted(frozenset().union(*(own.machines for own in found))))}.
"""


def _targets(timed: Sequence[Found]) -> str:
    """What was aimed at, and whether it is so."""
    if not timed:
        return "No times are measured yet."
    within = [own for own in timed if _mean(own.early("0.01", "score")) >= _mean(_models(own)) - 0.01]
    half = [own for own in within if _mean(own.saved()) >= WORTH]
    intents = [own for own in timed if own.task in INTENTS]
    quick = [own for own in intents if _mean(own.saved()) >= WORTH_INTENT]
    int8 = [own for own in timed if _mean(own.int8) >= INT8]
    slow = [own.title for own in timed if min(own.saved()) < -SLOWER]
    count, most = len(timed), 2 * len(timed) / 3
    names = "".join(f"; not {name}" for name in slow)
    lines = [
        f"At least {WORTH:.0%} of the time saved at one text within a point on two classifiers of three: "
        f"{len(half)} of {count}: {verdict(len(half) >= most)}.",
        f"At least {WORTH_INTENT:.0%} on intents: {len(quick)} of {len(intents)}: {verdict(quick == intents)}.",
        f"Early int8 at least {INT8:g} times as fast as int8 at full depth on two of three: {len(int8)} of {count}: "
        f"{verdict(len(int8) >= most)}.",
        f"Nowhere slower than before, within {SLOWER:.0%}: {verdict(not slow)}{names}.",
    ]
    return "Targets:\n\n" + "\n".join(f"* {line}" for line in lines)


def _headline(found: Sequence[Found]) -> str:
    rows = []
    for own in found:
        measured = [_shares(own.saved(way)) if own.clocks else "-" for way in ("one", "batch")]
        cells = [_shares(own.early("0.01", name)) for name in ("score", "answers_as_full_depth", "blocks_saved")]
        rows.append([own.title, _shares(_models(own)), *cells, *measured])
    columns = ["classifier", "model", "with exits", "same answer", "blocks saved", "time saved", "time saved, batches"]
    return markdown(columns, rows)


def _ladder(timed: Sequence[Found]) -> str:
    def cell(own: Found, way: str) -> str:
        return _range([clock["one"][way] for clock in own.clocks], lambda ms: f"{ms:.2f}")

    rows = [[own.title, *(cell(own, way) for way in LADDER)] for own in timed]
    titles = ["PyTorch", "early", "ONNX Runtime", "early", "int8", "early"]
    return markdown(["classifier", *titles], rows)


def _picture(timed: Sequence[Found]) -> str:
    if not timed:
        return ""
    return f"""

A circle is the model as it was, a dot the same model with exits, and a dashed line one depth for all texts. Scores are
of all test rows in float32; for int8 the difference on the timed rows is added.

![Score against milliseconds, for each classifier and runtime, before and with exits]({PICTURE})"""


def _half(found: Sequence[Found]) -> str:
    names = ("score", "answers_as_full_depth", "blocks_saved", "expected_time_saved")
    rows = [[own.title, _shares(_models(own)), *(_shares(own.early("0.005", n)) for n in names)] for own in found]
    columns = ["classifier", "model", "with exits", "same answer", "blocks saved", "time saved, expected"]
    return markdown(columns, rows)


def _rivals(found: Sequence[Found]) -> str:
    rows = []
    for own in found:
        early = f"{_shares(own.early('0.01', 'score'))} at {_shares(own.early('0.01', 'blocks_saved'))}"
        fixed = [_at(adapter["drops"]["0.01"]["fixed_depth"]) for adapter in own.adapters[:1]]
        plain = _at(own.others["plain0"]["drops"]["0.01"]) if "plain0" in own.others else "-"
        models = own.others.get("rivals", {})
        ms = models.get("full", {}).get("ms", float("nan"))
        students = [
            f"{name.removeprefix('first ')}: {each['score']:.1%} at {1 - each['ms'] / ms:.0%}"
            for name, each in models.items()
            if name.startswith("first ")
        ]
        linear = own.others.get("linear")
        rows.append([own.title, early, *fixed, plain, "; ".join(students) or "-", _score(linear)])
    columns = ["classifier", "with exits", "fixed depth", "plain form", "first blocks", "tf-idf"]
    return markdown(columns, rows)


def _exits(found: Sequence[Found]) -> str:
    most = max(len(own.adapters[0]["per_exit"]) for own in found)
    rows = []
    for own in found:
        first = own.adapters[0]
        scores = dict(zip(first["exit_layers"], first["per_exit"], strict=True))
        rows.append([own.title, *(f"{100 * scores[m]:.1f}" if m in scores else "" for m in range(most))])
    return markdown(["classifier", *map(str, range(most))], rows)


def _models(own: Found) -> list[float]:
    return [adapter["model"] for adapter in own.adapters]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _shares(values: Sequence[float | None]) -> str:
    known = [value or 0.0 for value in values]
    return _range(known, lambda share: f"{100 * share:.1f}%")


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean, and from where to where values lie where they differ."""
    low, high = show(min(values)), show(max(values))
    return show(_mean(values)) + ("" if low == high else f" ({low} to {high})")


def _at(early: Record) -> str:
    return f"{early['score']:.1%} at {early['blocks_saved']:.1%}"


def _score(record: Record | None) -> str:
    return "-" if record is None else f"{record['score']:.1%}"
