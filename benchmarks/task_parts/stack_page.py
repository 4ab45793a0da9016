"""The section on a stack of real tasks, from the file of the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latency_parts.tables import markdown

SECTION, TIMES = "stack", "stack-time"


def stack_section(data: Mapping[str, Any]) -> str:
    """Markdown; nothing where no such stack was measured."""
    sections = data["sections"]
    tasks = {key.split("/")[1]: own for key, own in sections.items() if key.startswith(f"{SECTION}/")}
    if not tasks:
        return ""
    lines = [_line(task, own) for task, own in tasks.items()]
    heads = [
        *("", "test rows", "metric", "frozen: full depth", "frozen, with exits", "blocks saved", "own encoder"),
        "frozen costs, points",
    ]
    return f"""
## A real stack

Adapters on one frozen all-MiniLM-L6-v2 (6 blocks, exits 0 to 6), each calibrated to lose at most one point, beside an
encoder of its own for each task, all of it trained on the same rows. The last column is what the frozen backbone costs
at full depth. Rows to train, to calibrate and to test on are parts of DATA, not the official splits.

{markdown((heads, lines))}

{_trained(tasks)}{_tokens(tasks)}
{_times(sections.get(TIMES))}
```bash
badge-peft train MINILM DATA/TASK/train.jsonl --eval-data DATA/TASK/validation.jsonl \\
    --backbone frozen --exit-layers 0-6 --carry none --output-dir ADAPTERS/TASK
python benchmarks/stack.py MINILM DATA --adapters {" ".join(f"{task}=ADAPTERS/{task}" for task in tasks)} ...
```
"""


def _line(task: str, own: Mapping[str, Any]) -> list[str]:
    frozen, full = own["frozen"], own.get("full")
    early = frozen["early_exit"]
    line = [
        *(task, f"{frozen['rows']:,}", frozen["metric"]),
        *(f"{100 * value:.1f}" for value in (frozen["full_depth_score"], early["score"])),
        f"{early['layer_speedup']:.0%}",
    ]
    if full is None:
        return [*line, "-", "-"]
    return [*line, f"{100 * full['score']:.1f}", f"{100 * (full['score'] - frozen['full_depth_score']):.1f}"]


def _trained(tasks: Mapping[str, Any]) -> str:
    found = {task: own["full"] for task, own in tasks.items() if "full" in own}
    if not found:
        return ""
    rows = ", ".join(f"{task} {own['train_rows']:,}" for task, own in found.items())
    first = next(iter(found.values()))
    precision = "bfloat16" if first["bf16"] else "float32"
    return (
        f"The own encoders were trained for {first['epochs']} epochs in {precision}, one seed, on all rows ({rows})."
    )


def _tokens(tasks: Mapping[str, Any]) -> str:
    found = [task for task, own in tasks.items() if own["frozen"]["metric"] == "entity_f1"]
    if not found:
        return ""
    return f" {', '.join(found)} labels tokens ([how it was trained](tokens.md)); its score is the F1 of entities."


def _times(times: Mapping[str, Any] | None) -> str:
    if times is None:
        return ""
    lines = [
        [own["name"], f"{own['p50_ms']:.1f}", f"{own['p95_ms']:.1f}", f"{own['blocks']:.1f}"]
        for own in times["results"]
    ]
    where = times["environment"]
    return f"""
Time per text, {times["rows"]} test texts of all tasks in turn, one by one (PyTorch, float32, {times["threads"]}
threads, load {where["load_1min"]} at the start):

{markdown((["", "median, ms", "95th percentile, ms", "blocks"], lines))}
"""
