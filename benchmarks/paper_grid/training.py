"""One run: train, score every exit on validation and test, keep the logits."""

from __future__ import annotations

import gc
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import describe, machine
from transformers import AutoTokenizer, DataCollatorWithPadding, PrinterCallback, set_seed
from transformers.utils import logging

from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.evaluation import ExitLogits, collect_exit_logits, exit_scores
from badge_peft.training import MultiExitTrainer, multi_exit_arguments
from paper_grid.data import TaskData, load_task
from paper_grid.models import find_backbone, make_model
from paper_grid.settings import Settings
from paper_grid.states import SharedStates
from paper_grid.store import Store


class Workshop:
    """Trains runs; what they share (tokenized data, tokenizers, states) is made once."""

    def __init__(
        self, settings: Settings, store: Store, data_dir: str | None = None, model_dir: str | None = None
    ) -> None:
        self.settings, self.store = settings, store
        self.data_dir = data_dir
        self.model_dir = model_dir
        self._data: dict[str, TaskData] = {}
        self._tokenizers: dict[str, Any] = {}
        self._states = SharedStates(store.root)
        logging.set_verbosity_error()  # no word about weights that a fresh head does not find
        logging.disable_progress_bar()

    def path(self, run: dict[str, Any]) -> str:
        """Where the run's backbone is."""
        return find_backbone(self.settings.backbones[run["backbone"]], self.model_dir)

    def tokenizer(self, run: dict[str, Any]) -> Any:
        """The tokenizer of the run's backbone."""
        if run["backbone"] not in self._tokenizers:
            self._tokenizers[run["backbone"]] = AutoTokenizer.from_pretrained(self.path(run))
        return self._tokenizers[run["backbone"]]

    def data(self, run: dict[str, Any]) -> TaskData:
        """The run's task, tokenized."""
        name = _place(run)
        if name not in self._data:
            self._data[name] = load_task(run, self.data_dir, self.tokenizer(run))
            gc.freeze()  # the rows stay, and every training collects garbage
        return self._data[name]

    def collator(self, run: dict[str, Any]) -> DataCollatorWithPadding:
        """Makes batches of the run's rows."""
        return DataCollatorWithPadding(self.tokenizer(run))

    def states(self, run: dict[str, Any], model: Any, split: str) -> CachedStates | None:
        """What the exits of a frozen backbone read of the run's rows, which all runs of the task share; else None."""
        if run["mode"] != "frozen":
            return None
        rows = self.data(run).splits[split]
        return self._states.of(_place(run), run, model, split, rows, self.collator(run))

    def trainer(self, run: dict[str, Any], folder: Path, model: Any, states: CachedStates | None) -> MultiExitTrainer:
        """A trainer for the run, without anything that costs time and tells nothing."""
        data = self.data(run)
        last: dict[str, Any] = {
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
        }
        arguments = multi_exit_arguments(
            model,
            str(folder),
            learning_rate=run["backbone_lr"],
            num_train_epochs=run["epochs"],
            per_device_train_batch_size=run["batch_size"],
            per_device_eval_batch_size=max(64, run["batch_size"]),
            seed=run["seed"],
            bf16=run["bf16"] and run["mode"] != "frozen",  # whose exits train in one function of their own in float32
            use_cpu=not torch.cuda.is_available(),
            save_only_model=True,
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **(last if run["patience"] is None else {}),
        )
        trainer = MultiExitTrainer(
            model=model,
            args=arguments,
            train_dataset=data.splits["train"],
            eval_dataset=data.splits["validation"],
            data_collator=self.collator(run),
            objective=run["objective"],
            depth=run["depth"],
            adapter_learning_rate=run["adapter_lr"],
            metric=run["metric"],
            early_stopping_patience=run["patience"],
            cache_states=states,
            **run.get("training", {}),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, run: dict[str, Any]) -> dict[str, Any]:
        """Trains one run and stores it; returns what is in `run.json`. A trial of the search is scored on validation
        data alone."""
        start = time.perf_counter()
        data = self.data(run)
        with self.store.scratch() as folder:
            set_seed(run["seed"])
            model = make_model(run, self.path(run), data)
            splits = ("validation",) if run["purpose"] == "search" else ("validation", "test")
            states = {split: self.states(run, model, split) for split in ("train", *splits)}
            set_seed(run["seed"])  # whatever the pass has drawn
            trainer = self.trainer(run, folder, model, states["train"])
            trained = time.perf_counter()
            trainer.train()
            trained = time.perf_counter() - trained
            logits = {
                split: collect_exit_logits(
                    model,
                    data.splits[split],
                    batch_size=64,
                    cached_states=states[split],
                )
                for split in splits
            }
        result = {
            "scores": {split: scores(one, run["metric"]) for split, one in logits.items()},
            "seconds": {"train": round(trained, 2), "total": round(time.perf_counter() - start, 2)},
            "data": {"digest": data.digest, "rows": {s: len(rows) for s, rows in data.splits.items()}},
            "environment": f"{machine(describe(torch.get_num_threads()))}; badge_peft commit {_commit()}",
        }
        self.store.write(run, result, logits if run["purpose"] == "result" else {})
        return result


def _place(run: dict[str, Any]) -> str:
    """What tells the rows of a run, as its backbone reads them, from others."""
    return str([run[k] for k in ("data", "rows", "data_seed", "max_length", "backbone")])


def scores(logits: ExitLogits, metric: str) -> dict[str, Any]:
    """Scores per exit; S-avg and S-best are over the exits behind a block, so that exit 0 does not change what they
    mean."""
    found = exit_scores(logits, metric)
    behind = [s for m, s in zip(found.exit_layers, found.per_exit, strict=True) if m > 0]
    return {
        "exits": found.exit_layers,
        "per_exit": found.per_exit,
        "avg": sum(behind) / len(behind),
        "best": max(behind),
        "final": behind[-1],
    }


@cache
def _commit() -> str:
    """Of the source tree, `-dirty` where it differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
