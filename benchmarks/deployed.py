"""Deployed classifiers: fine-tuned by plain Trainer, then given exits by `badge-peft train` without an option.

    python benchmarks/deployed.py finetune --data-dir DATA --model-dir MODELS  # the classifiers
    python benchmarks/deployed.py exits --data-dir DATA  # adapters, scored on test rows
    python benchmarks/deployed.py clock --data-dir DATA  # times; on a quiet machine
    python benchmarks/deployed.py page --docs docs/results/deployed.md

Each step leaves out what is there, so that it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from common import Results, describe, write_page  # noqa: E402
from deployed_parts.clock import time_adapter  # noqa: E402
from deployed_parts.exits import train_exits  # noqa: E402
from deployed_parts.finetune import finetune  # noqa: E402
from deployed_parts.page import PICTURE, page, read_found  # noqa: E402
from deployed_parts.picture import draw  # noqa: E402
from deployed_parts.rivals import compare_models, linear_model  # noqa: E402
from deployed_parts.scores import score_adapter  # noqa: E402
from paper_grid.models import find_backbone  # noqa: E402
from paper_grid.settings import Backbone  # noqa: E402

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "deployed.json"


@dataclass(frozen=True)
class Classifier:
    """A task on a backbone."""

    task: str
    backbone: str
    settings: dict[str, Any]
    out: Path
    data: Path

    @property
    def name(self) -> str:
        return f"{self.task}-{self.backbone}"

    @property
    def own(self) -> dict[str, Any]:
        return self.settings["tasks"][self.task]

    @property
    def tokens(self) -> bool:
        return bool(self.own.get("tokens"))

    @property
    def students(self) -> list[int]:
        return self.settings["backbones"][self.backbone]["students"]

    def model(self, blocks: int | None = None) -> Path:
        return self.out / "models" / (self.name if blocks is None else f"{self.name}-first{blocks}")

    def record(self, kind: str, make: Any) -> None:
        """Makes and writes a record, where it is not there."""
        path = self.out / "records" / f"{self.name}.{kind}.json"
        if path.exists():
            return
        print(f"== {self.name} {kind}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        made = {"where": describe(torch.get_num_threads()), **make()}
        part.write_text(json.dumps(made, indent=1), encoding="utf-8")
        os.replace(part, path)


def finetune_all(it: Classifier, args: argparse.Namespace) -> None:
    for blocks in [None, *(it.students if args.students else [])]:
        folder = it.model(blocks)
        if folder.exists():
            continue
        print(f"== {folder.name}", flush=True)
        fields = {k: v for k, v in it.settings["backbones"][it.backbone].items() if k != "students"}
        part = folder.with_name(folder.name + ".part")
        own = {key: value for key, value in it.own.items() if key in ("epochs", "max_length", "tokens")}
        source = find_backbone(Backbone(**fields), args.model_dir)
        finetune(source, it.data, part, **own, **it.settings["finetune"], max_blocks=blocks)
        os.rename(part, folder)


def exits_all(it: Classifier, args: argparse.Namespace) -> None:
    for seed in args.seeds if args.seeds is not None else it.settings["exit_seeds"]:
        for kind in ("default", "plain") if seed == it.settings["exit_seeds"][0] and not it.tokens else ("default",):
            folder = it.out / "adapters" / f"{it.name}.{kind}{seed}"
            if not folder.exists():
                print(f"== {folder.name}", flush=True)
                train_exits(it.model(), it.data, folder, seed, kind == "plain", torch.get_num_threads())
            pool = it.out / "pools" / f"{folder.name}.safetensors"
            it.record(f"{kind}{seed}", lambda f=folder, p=pool: score_adapter(f, it.data / "test.jsonl", p))


def clock_all(it: Classifier, args: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    for seed in it.settings["exit_seeds"]:
        folder = it.out / "adapters" / f"{it.name}.default{seed}"
        if folder.exists():
            it.record(f"clock{seed}", lambda folder=folder: time_adapter(folder, it.data / "test.jsonl", threads))
    models = {"full": it.model(), **{f"first {k}": it.model(k) for k in it.students if it.model(k).exists()}}
    timed = 100
    it.record("rivals", lambda: compare_models(models, it.data, it.own["max_length"], it.tokens, timed))
    if not it.tokens:
        it.record("linear", lambda: linear_model(it.data, timed))


def collect(records: Path, file: Path) -> Results:
    """All records that there ever were, those of the folder added."""
    results = Results(file)
    for path in sorted(records.glob("*.json")):
        results.keep(path.stem.replace(".", "/"), json.loads(path.read_text(encoding="utf-8")))
    return results


def classifiers(settings: dict[str, Any], args: argparse.Namespace) -> Iterator[Classifier]:
    for backbone in settings["backbones"]:
        for task in settings["tasks"]:
            if not args.only or f"{task}/{backbone}" in args.only:
                yield Classifier(task, backbone, settings, args.out, (args.data_dir or Path()) / task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["finetune", "exits", "clock", "page"])
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--model-dir", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/deployed"))
    parser.add_argument("--only", nargs="*", default=None, help="task/backbone, such as banking77/minilm")
    parser.add_argument("--seeds", nargs="*", type=int, default=None, help="of the exits")
    parser.add_argument("--students", action="store_true", help="finetune: the first blocks alone, too")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=RESULTS, help="page: where records are kept")
    parser.add_argument("--docs", type=Path, default=None, help="page: where to write it, with its picture")
    args = parser.parse_args()
    settings = yaml.safe_load(args.settings.read_text(encoding="utf-8"))
    torch.set_num_threads(args.threads or settings["threads"])
    if args.step == "page":
        found = read_found(collect(args.out / "records", args.json), classifiers(settings, args))
        if args.docs is not None and any(own.clocks for own in found):
            draw(found, args.docs.parent / PICTURE)
        write_page(page(found), args.docs)
        return
    if args.data_dir is None:
        parser.error("--data-dir is needed: a folder with one folder per task.")
    step = {"finetune": finetune_all, "exits": exits_all, "clock": clock_all}[args.step]
    for it in classifiers(settings, args):
        if args.step == "finetune" or it.model().exists():
            step(it, args)


if __name__ == "__main__":
    main()
