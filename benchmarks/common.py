"""What the benchmarks share: options, a file of results that grows, where it was measured, and the parts of a page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from badge_peft.utils.files import write_json

_PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "onnx", "badge-peft")


class Results(dict[str, Any]):
    """What has been measured, in a JSON file that is written whenever something is added."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__(json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {})

    def keep(self, key: str, value: Any) -> None:
        """Adds something; a reader sees the old file or the new one."""
        self[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self, indent=1)

    def below(self, prefix: str) -> dict[str, Any]:
        """What is kept under `prefix/`, by the rest of its key."""
        return {key.removeprefix(f"{prefix}/"): own for key, own in self.items() if key.startswith(f"{prefix}/")}


def parser(doc: str | None, results: str, threads: int = 2) -> argparse.ArgumentParser:
    """With the options that all have; `results` is the default of `--json`."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--json", default=results, help="the file of the results; what is in it is not measured again")
    made.add_argument("--docs", metavar="FILE", help="measure nothing: write the page from the file of the results")
    made.add_argument("--threads", type=int, default=threads, help="of torch, and of each session of ONNX Runtime")
    return made


def pools_option(made: argparse.ArgumentParser) -> None:
    """`--logits`, which `pools_of` reads."""
    made.add_argument("--logits", nargs="*", default=[], metavar="TASK=FILE", help="pools of labeled exit logits")


def pools_of(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Each task, with the file of its pool."""
    for item in options.logits:
        task, file = item.split("=", 1)
        yield task, file


def run(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Results], None],
    page: Callable[[Results], str],
) -> int:
    """Measures what the file lacks and prints the page, or with `--docs` writes the page of what is there."""
    results = Results(options.json)
    if not options.docs:
        torch.set_num_threads(options.threads)
        measure(options, results)
    if not results:
        raise FileNotFoundError(f"{options.json} holds nothing to write a page from: measure first.")
    write_page(page(results), options.docs)
    return 0


def write_page(text: str, docs: str | Path | None) -> None:
    """Writes a page, or prints it where no file is named."""
    if docs is None:
        print(text)
        return
    Path(docs).parent.mkdir(parents=True, exist_ok=True)
    Path(docs).write_text(text, encoding="utf-8")


def describe(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Where something is measured; `load_1min` is well above 0 where something else runs."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def machine(where: dict[str, Any]) -> str:
    """The machine and the versions of `describe`, without what differs from run to run."""
    cores, threads = counted(where["cores"], "core"), counted(where["threads"], "thread")
    return f"{where['cpu']}, {cores}, {threads}; {versions(where)}"


def counted(number: int, thing: str) -> str:
    """Such as "1 core" or "2 threads"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def versions(where: dict[str, Any]) -> str:
    """Python and the libraries."""
    return ", ".join([f"Python {where['python']}", *(f"{name} {found}" for name, found in where["versions"].items())])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of a page."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quartiles(values: Any) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(value) for value in np.quantile(np.asarray(values), (0.25, 0.5, 0.75))]


def spread(values: Any, digits: int = 3) -> str:
    """`1.234 (1.200-1.300)`: the median and the quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def calibrated(*arguments: Any, **options: Any) -> Any:
    """`calibrate`; that a fixed depth is as good, or that rows are few, is an answer like any other."""
    from badge_peft.evaluation import calibrate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate(*arguments, **options)


def fit(
    model: Any, rows: Any, collator: Any, objective: Any = "joint", cache_states: Any = False, **arguments: Any
) -> None:
    """Trains exits, without looking at other rows on the way: the last state counts."""
    from badge_peft.training import MultiExitTrainer, multi_exit_arguments

    alone = {
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
    }
    with TemporaryDirectory() as folder:
        MultiExitTrainer(
            model=model,
            args=multi_exit_arguments(model, folder, **alone, label_names=["labels"], **arguments),
            train_dataset=rows,
            data_collator=collator,
            objective=objective,
            cache_states=cache_states,
        ).train()
    model.eval()


def verdict(reached: bool) -> str:
    """Of a target."""
    return "reached" if reached else "missed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
