"""What `promises.py` and `drift.py` share: pools of stored exit logits by task, and one file of results that grows."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from badge_peft.evaluation import ExitLogits

Results = dict[str, Any]


def parser(doc: str | None, draws: int, results: str) -> argparse.ArgumentParser:
    """With the options that both have.

    Args:
        doc: Of the benchmark; its first line is the help.
        draws: Default of `--draws`.
        results: Default of `--json`.
    """
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--logits", nargs="*", default=[], metavar="TASK=FILE", help="pools of labeled exit logits")
    made.add_argument("--draws", type=int, default=draws)
    made.add_argument("--json", default=results, help=f"the file of the results (default: {results})")
    made.add_argument("--docs", metavar="FILE", help="measure nothing: write the page from the file")
    return made


def run(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, str, ExitLogits, Results], Iterator[str]],
    page: Callable[[Results], str],
) -> int:
    """Measures every pool and prints the page, or writes the page alone.

    Args:
        options: From `parser`.
        measure: Given the options, a task, its pool and the results, puts more into the results; yields a name for
            whatever is worth keeping, and the file is written.
        page: In Markdown.

    Returns:
        The exit status.
    """
    path = Path(options.json)
    data: Results = json.loads(path.read_text()) if path.exists() else {}
    if options.docs:
        Path(options.docs).write_text(page(data), encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    for item in options.logits:
        task, _, file = item.partition("=")
        start = time.perf_counter()
        for name in measure(options, task, ExitLogits.load(file), data):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data))
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            start = time.perf_counter()
    print(page(data))
    return 0
