"""Tables 1, 2, 3 and 6 of the paper, exit 0, and the policies at given savings, as markdown."""

from __future__ import annotations

import math

import numpy as np
from common import markdown

from paper_grid import published
from paper_grid.curves import at
from paper_grid.methods import TABLE_1, TITLES
from paper_grid.records import Place, Record, method_scores, places, variant_scores
from paper_grid.settings import Settings
from paper_grid.statistics import Paired, paired, summary

#: Bypasses with a rival's objective, and the methods of which they are made.
_COMBINED = {
    "badge_alternating": ("badge", "alternating"),
    "badge_gradient_equilibrium": ("badge", "gradient_equilibrium"),
}


def table_1(settings: Settings, records: list[Record]) -> str:
    """Training methods: one table of scores per backbone and mode, and one of paired differences."""
    text = ""
    for backbone, mode in dict.fromkeys(place[1:] for place in places(records)):
        found = [place for place in places(records) if place[1:] == (backbone, mode)]
        rows = []
        for row in (*TABLE_1, "badge_lte", *_COMBINED):
            cells = []
            for place in found:
                avg, best = (method_scores(records, place, row, what) for what in ("avg", "best"))
                cells.append(f"{summary(avg) if row != 'single_final' else '-'} / {summary(best)}" if best else "-")
            if any(cell != "-" for cell in cells):
                rows.append([f"**{TITLES[row]}**" if row == "badge" else TITLES[row], *cells])
        if len(rows) < 2:
            continue
        header = ["S-avg / S-best", *(task_title(settings, place[0]) for place in found)]
        text += f"### {title_of(settings, backbone)}, backbone {mode}\n\n{markdown(header, rows)}\n\n"
        text += _differences(settings, records, found)
    return text


def _differences(settings: Settings, records: list[Record], found: list[Place]) -> str:
    """One method minus another, S-avg and S-best: per task over seeds, and over all pairs of task and seed."""
    ours = [("badge", row) for row in TABLE_1 if row not in ("badge", "single_final")]
    combined = [(row, other) for row, parts in _COMBINED.items() for other in parts]
    text = ""
    for what, name in (("avg", "S-avg"), ("best", "S-best")):
        rows = []
        for method, other in (*ours, *combined):
            pairs = [paired(*(method_scores(records, place, m, what) for m in (method, other))) for place in found]
            everything = [difference for pair in pairs if pair for difference in pair.differences]
            if everything:
                together = Paired(everything)
                cells = [f"{TITLES[method]} - {TITLES[other]}", *(pair.text if pair else "-" for pair in pairs)]
                known = what == "avg" and method == "badge"
                paper = [published.paper_difference(other), together.verdict()] if known else ["-", "-"]
                rows.append([*cells, together.text, *paper])
        if rows:
            header = [name, *(task_title(settings, p[0]) for p in found), "all pairs", "paper", "the paper's ordering"]
            text += markdown(header, rows) + "\n\n"
    note = (
        "Paired by seed: mean difference [95% interval, Student's t] (pairs). `all pairs` takes the pairs of all "
        "tasks together, as if tasks were alike.\n\n"
    )
    return note + text if text else ""


def paper_table_1() -> str:
    """The paper's figures."""
    rows = [
        [TITLES[row], *(f"{a if a is not None else '-'} / {b}" for a, b in published.TABLE_1[row].values())]
        for row in TABLE_1
    ]
    return markdown(["S-avg / S-best", *published.TASKS_1], rows)


def table_2(settings: Settings, records: list[Record]) -> str:
    """Placements."""
    forms = {"none": None, "block": {}, "ffn": {"placement": "ffn"}, "mhsa": {"placement": "mhsa"}}
    return _variants(settings, records, "placement", forms)


def table_3(settings: Settings, records: list[Record]) -> str:
    """Bottleneck dimensions."""
    sizes = sorted({r.variant["r"] for r in records if set(r.variant) == {"r"}} | {settings.r})
    forms = {"r=0 (JT)": None, **{f"r={r}": ({} if r == settings.r else {"r": r}) for r in sizes}}
    return _variants(settings, records, "r", forms)


def _variants(settings: Settings, records: list[Record], what: str, forms: dict[str, dict[str, object] | None]) -> str:
    """None is what the others are compared with: JT."""
    rows = []
    for place in places(records):
        if not any(variant_scores(records, place, variant, "avg") for variant in forms.values() if variant):
            continue
        plain = method_scores(records, place, "joint", "avg")
        for name, variant in forms.items():
            method = "joint" if variant is None else "badge"
            avg, best = (variant_scores(records, place, variant or {}, x, method) for x in ("avg", "best"))
            pair = paired(avg, plain) if variant is not None else None
            if avg:
                cells = [summary(avg), summary(best), pair.text if pair else "-"]
                rows.append([place_title(settings, place), name, *cells])
    return markdown(["task", what, "S-avg", "S-best", "S-avg - JT, paired"], rows) if rows else ""


def table_6(settings: Settings, records: list[Record]) -> str:
    """Backbones: JT, ALT and BADGE."""
    rows = []
    for place in places(records):
        methods = ("joint", "alternating", "badge")
        avg, best = ([method_scores(records, place, m, what) for m in methods] for what in ("avg", "best"))
        if (pair := paired(avg[2], avg[0])) is not None:
            cells = [f"{summary(a)} / {summary(b)}" if a else "-" for a, b in zip(avg, best, strict=True)]
            rows.append([place_title(settings, place), *cells, pair.text, pair.verdict()])
    for backbone, scores in published.TABLE_6.items():
        cells = {m: f"{a} / {b}" for m, (a, b) in scores.items()}
        gain = scores["badge"][0] - scores["joint"][0]
        rows.append([f"the paper: RTE, {backbone}", *cells.values(), f"{gain:+.1f}", "-"])
    return markdown(["S-avg / S-best", "JT", "ALT", "BADGE", "BADGE - JT, paired S-avg", "BADGE ahead of JT"], rows)


def exit_0_table(settings: Settings, records: list[Record]) -> str:
    """What an exit on the embeddings gives, and what it does to the others."""
    rows = []
    for place in places(records):
        for method in ("joint", "badge"):
            with_it = [r for r in records if r.place == place and r.method == method and r.variant == {"exit_0": True}]
            if not with_it:
                continue
            first = {r.seed: 100 * r.result["scores"]["test"]["per_exit"][0] for r in with_it}
            avg = {r.seed: r.score("avg") for r in with_it}
            without = method_scores(records, place, method, "avg")
            pair = paired(avg, without)
            cells = [summary(first), summary(avg), summary(without), pair.text if pair else "-"]
            rows.append([place_title(settings, place), TITLES[method], *cells])
    header = ["task", "method", "exit 0 alone", "S-avg of exits 1..M with it", "without it", "paired difference"]
    return markdown(header, rows) if rows else ""


def saving_table(curves: dict[str, dict[int, np.ndarray]], savings: list[float]) -> str:
    """Scores of the policies at given savings, the mean over seeds, and how far DGE is ahead."""
    header = ["policy", *(f"{s:.0%} saved" for s in savings), *(f"DGE - it, {s:.0%}" for s in savings)]
    rows = []
    ours = curves.get("DGE", {})
    for name, seeds in curves.items():
        scores = [[at(c, s) for c in seeds.values()] for s in savings]
        cells = [f"{np.mean(x):.1f}" if not any(map(math.isnan, x)) else "not reached" for x in scores]
        gaps = []
        for s in savings:
            pair = paired(*({k: at(c, s) for k, c in one.items()} for one in (ours, seeds)))
            gaps.append(pair.text if pair and name != "DGE" else "-")
        rows.append([name, *cells, *gaps])
    return markdown(header, rows)


def title_of(settings: Settings, backbone: str) -> str:
    """A backbone's name for readers."""
    return settings.backbones[backbone].title or backbone


def task_title(settings: Settings, task: str) -> str:
    """A task's name for readers."""
    return settings.tasks[task].title or task


def place_title(settings: Settings, place: Place) -> str:
    """Task, backbone and mode for readers."""
    return f"{task_title(settings, place[0])}, {title_of(settings, place[1])}, {place[2]}"
