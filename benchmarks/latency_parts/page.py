"""The results as text for a terminal and as a page of the documentation, both from the JSON file alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latency_parts.causes import TEXT as CAUSES
from latency_parts.causes import causes
from latency_parts.settings import EXPERIMENTS
from latency_parts.tables import Table, limits, markdown, megabytes, ratios, times, verdicts
from latency_parts.targets import judge_all

_HOW = """Random weights, float32 unless int8 is named, rows without padding. Rows leave by real decisions (DGE,
cross-entropy, threshold 0.2, patience 1) at blocks that the first token of each row sets, so that where a row leaves
is known beforehand; that it left there is checked, and a row that did not is marked with `!` and measured against the
block at which it left. DGE cannot stop at block 1: that row is for `fixed_depth` alone.

A *ratio* is time / (share of the blocks that ran x time of the model without exits at full depth): 1.00 means that
half of the blocks take half of the time. What is compared takes its turn in the same process, round by round; a ratio
is the median over the rounds of the quotient within a round, with the quartiles in brackets.

That share forgets what the model without exits pays outside of its blocks: embeddings, masks, pooler, head, and the
call itself, which a row that leaves early pays in full. The *limit* is what a call could do with that computes k of M
blocks, an exit for nothing and all the rest: outside of the blocks + k/M of (full depth - outside of the blocks). What
is outside is the time of the same model with its list of blocks emptied, which takes its turn beside the full one in
every round; a *ratio to the limit* is time / limit within a round. ONNX Runtime sessions do
not spin (`session.intra_op.allow_spinning` = 0) and have `inter_op_num_threads` = 1: idle threads that spin take cores
from whatever runs next, and spoil both. Int8 against stock PyTorch is measured call after call, as in a service: each
call is made twice and the second counts. Beside it stands a call right after a pass of the stock model, whose weights
have driven its own out of the caches."""


def section_text(key: str, section: Mapping[str, Any]) -> str:
    """One section for the terminal."""
    from badge_peft.workflows.report import text_table

    experiment, size, device = key.split("/")
    where = section["environment"]
    machine = where["device"] if device == "cuda" else where["cpu"]
    head = f"{EXPERIMENTS[experiment]}\n{size}, {machine}, {_short(section)}"
    return "\n\n".join([head, *(text_table(*table) for table in _tables(experiment, section["rows"]))]) + "\n"


def targets_text(data: Mapping[str, Any]) -> str:
    """The table of targets for the terminal."""
    from badge_peft.workflows.report import text_table

    return text_table(*verdicts(judge_all(data["sections"])))


def write_page(data: Mapping[str, Any], docs: str | Path) -> Path:
    """Writes the page, and the folder for it.

    Raises:
        ValueError: nothing has been measured.
    """
    if not data["sections"]:
        raise ValueError("there is nothing to write a page from: measure first.")
    path = Path(docs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(data), encoding="utf-8")
    return path


def page(data: Mapping[str, Any]) -> str:
    """The page, as markdown."""
    sections = data["sections"]
    parts = ["# Speed", "What exits cost when nobody leaves, and what leaving saves, on the clock."]
    if data["quick"]:
        parts.append("**A trial run on a tiny model: the numbers say nothing about speed.**")
    parts += [
        "Made by",
        "```bash\npython benchmarks/latency.py --json FILE\n"
        "python benchmarks/latency.py --json FILE --docs docs/results/speed.md\n```",
        _HOW,
    ]
    parts += ["## Targets", _verdict_line(sections), markdown(verdicts(judge_all(sections)))]
    for experiment, title in EXPERIMENTS.items():
        parts.append(f"## {title}")
        found = {key: section for key, section in sections.items() if key.split("/")[0] == experiment}
        if not found:
            parts.append("Not measured.")
        for key, section in found.items():
            _, size, device = key.split("/")
            parts.append(f"### {size}, {section['environment']['device'] if device == 'cuda' else 'CPU'}")
            parts.append(f"{_short(section)}.")
            parts += [markdown(table) for table in _tables(experiment, section["rows"])]
    found_causes = causes(sections)
    if found_causes is not None:
        parts += ["## Where the time goes", CAUSES, markdown(found_causes)]
    parts += ["## Where it was measured", _where(sections)]
    return "\n\n".join(parts) + "\n"


def _tables(experiment: str, rows: list[dict[str, Any]]) -> list[Table]:
    first, limit = ratios(rows), limits(rows)
    first[0][0], limit[0][0] = "ratio", "ratio to the limit"
    second = megabytes(rows) if experiment == "memory" else times(rows)
    second[0][0] = "peak" if experiment == "memory" else "ms: median / p95"
    return [first, *([limit] if limit[1] and experiment != "full-depth" else []), second]


def _verdict_line(sections: Mapping[str, Any]) -> str:
    counts = Counter(verdict.status for verdict in judge_all(sections))
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    return (
        f"Bounds on medians, set before the measurement; one on several rows is reached when all of them are. {said}."
    )


def _short(section: Mapping[str, Any]) -> str:
    rounds = {row["rounds"] for row in section["rows"]}
    where = section["environment"]
    return f"{'/'.join(map(str, sorted(rounds)))} rounds, {where['threads']} threads, {where['date']}"


def _where(sections: Mapping[str, Any]) -> str:
    """Machine and versions, one line per combination, with the load before each experiment."""
    lines: dict[str, list[str]] = {}
    for key, section in sections.items():
        where = section["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        line = (
            f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads; {where['device']}; Python "
            f"{where['python']}, {versions}"
        )
        lines.setdefault(line, []).append(f"{key} (load {where['load_1min']}, {section['seconds']:.0f} s)")
    return "\n".join(f"* {line}: {', '.join(keys)}" for line, keys in lines.items())
