"""docs/results/ranking.md, from what has been measured."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
from common import machine, markdown, verdict

TOP_K, CANDIDATES = 10, 100  # of the headline
SAVED = {6: 0.40, 12: 0.50}  # target, by the number of blocks
KEPT = 0.95
NDCG_LOSS = 0.003
TIME_SHARE = 0.85
TIMES_FASTER = 6.0
STOCK = "PyTorch, stock"
LIBRARY = "sentence-transformers `rank`"
FASTEST = "ONNX Runtime int8, early exits"

Stored = dict[str, Any]
WAYS = ("exits", "margins on the model's own head", "clusters", "one depth")


def page(models: Sequence[Stored], notes: Sequence[str] = ()) -> str:
    """Markdown, from what `quality` and `clock` have stored of each model; the notes are said behind the targets."""
    parts = ["# Ranking", "\n".join(_point(line) for stored in models for line in headline(stored)), INTRODUCTION]
    parts += ["## Targets", markdown(*targets(models)), *(fill(note, 118) for note in notes)]
    for stored in models:
        found = stored["quality"]
        parts += [f"## {found['name']}, {found['blocks']} blocks", _pools(found), markdown(*table(found, "test"))]
        if "shift" in found["found"]:
            parts += [_shift(found), markdown(*table(found, "shift"))]
        if "clock" in stored:
            parts += [_clock(stored), markdown(*times(stored))]
    parts += ["## How it was made", _made(models)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """What `policy="top_k"` keeps of a ranking and what it saves ([Ranking](../ranking.md)). *Kept* is the
share of test queries whose top k is that of full depth, as a set; margins are chosen on other queries so that 95% of
these keep it, without relevance labels. *Recall* is the share of full depth's top k that are found, nDCG and MRR are
those at 10."""


def headline(stored: Stored) -> list[str]:
    """What is to be known of one model."""
    found = stored["quality"]
    rows = _rows(found, "test", "exits", TOP_K)
    full = found["found"]["test"]["full"]["ndcg"]
    lines = [
        f"{found['name']} ({found['blocks']} blocks), top {TOP_K} of {found['found']['test']['candidates']:.0f} "
        f"candidates: {_mean(rows, 'saved')} of the blocks saved; {_mean(rows, 'kept')} of the queries have full "
        f"depth's top {TOP_K}, nDCG@10 {_number(rows, 'ndcg')} (full depth {full:.3f})."
    ]
    if "clock" in stored:
        at = {row["way"]: row for row in _timed(stored, CANDIDATES)}
        lines.append(
            f"{found['name']}, a query of {CANDIDATES} candidates: {_median(at[LIBRARY]):.0f} ms by {LIBRARY}, "
            f"{_median(at['PyTorch, early exits']):.0f} ms with exits in PyTorch, {_median(at[FASTEST]):.0f} ms with "
            f"exits in ONNX Runtime int8: {_faster(at[LIBRARY], at[FASTEST]):.1f} times faster."
        )
    return lines


def targets(models: Sequence[Stored]) -> tuple[list[str], list[list[str]]]:
    """Each target, what was measured, and whether it is reached."""
    lines = []
    for stored in models:
        found = stored["quality"]
        rows = _rows(found, "test", "exits", TOP_K)
        name = found["name"]
        kept, saved, ndcg = (float(np.mean([row[key] for row in rows])) for key in ("kept", "saved", "ndcg"))
        if (bound := SAVED.get(found["blocks"])) is not None:
            what = f"{name}: blocks saved, top {TOP_K} kept for {KEPT:.0%} of the queries"
            reached = verdict(saved >= bound and kept >= KEPT)
            lines.append([what, f"at least {bound:.0%}", f"{saved:.1%}, kept for {kept:.1%}", reached])
        loss = found["found"]["test"]["full"]["ndcg"] - ndcg
        lines.append([f"{name}: nDCG@10 lost", f"at most {NDCG_LOSS}", f"{loss:.4f}", verdict(loss <= NDCG_LOSS)])
        if "clock" in stored:
            at = {row["way"]: row for row in _timed(stored, CANDIDATES)}
            ours = at["PyTorch, early exits"]
            share = (1 - 1 / _faster(at[STOCK], ours)) / float(np.mean(ours["saved"]))
            what = f"{name}: time saved over blocks saved, PyTorch, {CANDIDATES} candidates"
            lines.append([what, f"at least {TIME_SHARE}", f"{share:.2f}", verdict(share >= TIME_SHARE)])
            faster = _faster(at[LIBRARY], at[FASTEST])
            what = f"{name}: int8 with exits against {LIBRARY}, {CANDIDATES} candidates"
            bound = f"at least {TIMES_FASTER:.0f} times faster"
            lines.append([what, bound, f"{faster:.1f}", verdict(faster >= TIMES_FASTER)])
    return ["target", "bound", "measured", "result"], lines


def table(found: Stored, pool: str) -> tuple[list[str], list[list[str]]]:
    """One line for each k and way; of several seeds the mean and the range."""
    lines = []
    for k in dict.fromkeys(row["top_k"] for row in found["found"][pool]["rows"]):
        for way in WAYS:
            rows = _rows(found, pool, way, k)
            keys = ("kept", "recall", "saved")
            numbers = [_number(rows, key) for key in ("ndcg", "mrr")]
            lines.append([str(k), way, *(_mean(rows, key) for key in keys), *numbers])
    return ["k", "", "kept", "recall", "blocks saved", "nDCG@10", "MRR@10"], lines


def times(stored: Stored) -> tuple[list[str], list[list[str]]]:
    """Medians in milliseconds, and the quotient within a round against the library's own ranking."""
    rows = stored["clock"]["found"]
    counts = list(dict.fromkeys(row["candidates"] for row in rows))
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for count in counts:
            at = {row["way"]: row for row in _timed(stored, count)}
            ratios = np.divide(at[LIBRARY]["seconds"], at[way]["seconds"])
            low, high = np.percentile(ratios, (25, 75))
            cells.append(f"{_median(at[way]):.1f} ms; {np.median(ratios):.2f} ({low:.2f}-{high:.2f})")
        lines.append([way, *cells])
    return ["", *(f"{count} candidates" for count in counts)], lines


def _pools(found: Stored) -> str:
    test = found["found"]["test"]
    settings = found["settings"]
    exits = ", ".join(
        f"{number}: {value:.2f}"
        for number, value in zip(test["exits"], np.mean(test["correlations"], axis=0), strict=True)
    )
    full, first = test["full"], test["first_stage"]
    tuned = found.get("fine_tuning")
    made = "" if tuned is None else f"The cross-encoder learned from {tuned['pairs']:,} pairs. "
    return fill(
        f"{made}{test['queries']} test queries, {test['calibration_queries']} that chose the margins, the top "
        f"{settings['pool']} of BM25 each; exits learned from {found['train_rows']} other pairs, "
        f"{len(settings['seeds'])} seed(s): mean and range. Full depth: nDCG@10 {full['ndcg']:.3f}, MRR@10 "
        f"{full['mrr']:.3f} (BM25 itself: {first['ndcg']:.3f}, {first['mrr']:.3f}). Rank correlation of exits with "
        f"full depth: {exits}.",
        118,
    )


def _shift(found: Stored) -> str:
    shift = found["found"]["shift"]
    other = found["found"]["uncalibrated shift"]
    rows = [row for row in other["rows"] if row["way"] == "exits" and row["top_k"] == TOP_K]
    full = shift["full"]
    first = shift["first_stage"]
    return fill(
        f"The same model and exits on another collection ({found['shift']}), calibrated on "
        f"{shift['calibration_queries']} of its queries and measured on {shift['queries']} others. Full depth: "
        f"nDCG@10 {full['ndcg']:.3f}, MRR@10 {full['mrr']:.3f} (BM25: {first['ndcg']:.3f}, {first['mrr']:.3f}). With "
        f"the margins of the first collection the top {TOP_K} would be kept for {_mean(rows, 'kept')}, with "
        f"{_mean(rows, 'saved')} of the blocks saved:",
        118,
    )


def _clock(stored: Stored) -> str:
    made = stored["clock"]["made"]
    timed = _timed(stored, CANDIDATES)
    kept = {row["way"]: float(np.mean(row["kept"])) for row in timed}
    return fill(
        f"Time of a query, tokenizer included, {made['threads']} threads, median over {len(timed[0]['seconds'])} "
        f"queries; the ways take turns. Behind it, how many times faster than {LIBRARY} (median and quartiles of the "
        f"quotients within a round). Of these queries int8 alone keeps full depth's top {TOP_K} for "
        f"{kept['ONNX Runtime int8, stock']:.0%}, with exits {kept[FASTEST]:.0%}.",
        118,
    )


def _made(models: Sequence[Stored]) -> str:
    lines = []
    for stored in models:
        found = stored["quality"]
        made = found["made"]
        settings = found["settings"]
        chosen = {k: v for k, v in settings.items() if k in _SHOWN and v and v != 10**9}  # which is all of them
        given = [f"--{k.replace('_', '-')} {_argument(v)}".rstrip() for k, v in chosen.items()]
        shift = [] if found["shift"] is None else [f"--shift {found['shift']}"]
        parts = [f"--encoder {found['name']}", "--data wikiqa", *shift, "--work W", *given]
        lines.append(" \\\n    ".join(["python benchmarks/ranking.py quality", *parts]))
    lines.append("python benchmarks/ranking.py clock --work W")
    lines.append("python benchmarks/ranking.py page --work W --docs docs/results/ranking.md")
    machines = [part["made"] for stored in models for part in stored.values() if "made" in part]
    loads = ", ".join(f"{machine['load_1min']:.1f}" for machine in machines)
    return (
        "```bash\n" + "\n".join(lines) + "\n```\n\n" + METHOD + f"\n\n{machine(made)}; {made['date']}; load at the "
        f"start of each part: {loads}."
    )


_SHOWN = (
    *("queries", "shift_queries", "train_queries", "train_candidates", "max_train", "epochs", "listwise"),
    *("frozen_words", "bf16", "exit_epochs", "seeds", "exits"),
)

METHOD = """* No cross-encoder was at hand, so the encoder is fine-tuned as one first, on WikiQA's training pairs: it
  is no better than that. Then it is frozen, and `train_head=False`: what is returned are its own scores.
* *Exits*: distilled from its scores of other queries' candidates, no labels. *Margins on the model's own head*: the
  same rule and calibration without training, its head put behind every block. *Clusters*: training-free pruning in the
  manner of PRISM (Zhou et al., 2025): where the head's scores of the candidates are spread widely enough, they are
  grouped, and the groups below that of the k-th best leave; the threshold is chosen as the margins are. *One depth*:
  all candidates stop at the exit whose block costs most nearly the same, and it ranks.
* Candidates that left early are ranked behind the others, by the depth they reached."""


def _point(line: str) -> str:
    return fill(line, 118, initial_indent="* ", subsequent_indent="  ")


def _argument(value: Any) -> str:
    if value is True:
        return ""
    if isinstance(value, dict):
        return "'" + str(value).replace("'", '"') + "'"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _rows(found: Stored, pool: str, way: str, k: int) -> list[Stored]:
    return [row for row in found["found"][pool]["rows"] if row["way"] == way and row["top_k"] == k]


def _mean(rows: Sequence[Stored], key: str) -> str:
    values = [100 * row[key] for row in rows]
    low = f"{min(values):.1f}"
    high = f"{max(values):.1f}"
    spread = "" if low == high else f" ({low}-{high})"
    return f"{np.mean(values):.1f}%{spread}"


def _number(rows: Sequence[Stored], key: str) -> str:
    return f"{np.mean([row[key] for row in rows]):.3f}"


def _timed(stored: Stored, count: int) -> list[Stored]:
    return [row for row in stored["clock"]["found"] if row["candidates"] == count]


def _median(row: Stored) -> float:
    return 1e3 * float(np.median(row["seconds"]))


def _faster(base: Stored, other: Stored) -> float:
    """Median of the quotients within a round."""
    return float(np.median(np.divide(base["seconds"], other["seconds"])))
