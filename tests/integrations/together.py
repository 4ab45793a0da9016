"""What several processes do together, and one process alone: run with a folder as its argument, or `work` called.

Each process leaves what it found as `<rank>.json` and `<rank>.safetensors` in the folder.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from badge_peft import EarlyExitConfig, collect_exit_logits, multi_exit_arguments
from badge_peft.evaluation.collate import pad_features
from badge_peft.training import MultiExitTrainer
from badge_peft.utils import distributed
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.predict import predict
from tests.evaluation.rows import make_exits, make_rows
from tests.models import checkpoint
from tests.texts import make_tokenizer, sentences
from tests.training.runs import Rows, make, make_trainer, weights

ROWS = 16
BATCH = 8  # over all processes
EACH_EPOCH: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "save_total_limit": 1,
}

LORA = {"r": 4, "lora_dropout": 0.0}

# name -> (fields of the config, arguments of the trainer)
TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "joint, frozen": ({}, {}),
    "joint, lora": ({"backbone": "lora", "lora": LORA}, {}),
    "joint, full": ({"backbone": "full"}, {}),
    "joint, adamw": ({"backbone": "full"}, {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-4}),
    "joint, albert": ({"backbone": "full", "case": "albert"}, {}),
    "joint, mhsa, learning to exit": ({"placement": "mhsa", "learn_to_exit": True}, {}),
    "joint, the last exit its own": ({"backbone": "full", "final_exit": "exit"}, {}),
    "joint, accumulated": ({"backbone": "full"}, {"gradient_accumulation_steps": 2}),
    "joint, checkpointed": ({"backbone": "full"}, {"checkpoint": True}),
    "joint, cached": ({"exit_pooling": "mean"}, {"cache_states": True, "cache_dtype": "float32"}),
    "two stages, cached": ({}, {"objective": "two_stage", "cache_states": True, "cache_dtype": "float32"}),
    "two stages, frozen": ({}, {"objective": "two_stage", **EACH_EPOCH}),
    "two stages, lora": ({"backbone": "lora", "lora": LORA}, {"objective": "two_stage", "distillation": 1.0}),
    "two stages, full": ({"backbone": "full"}, {"objective": "two_stage", **EACH_EPOCH}),
    "alternating, full": ({"backbone": "full"}, {"objective": "alternating"}),
    "equilibrium, full": ({"backbone": "full"}, {"objective": "gradient_equilibrium"}),
    "equilibrium, lora": ({"backbone": "lora", "lora": LORA}, {"objective": "gradient_equilibrium"}),
    "past and future": (
        {"backbone": "full", "exit_type": "past_future", "final_exit": "exit"},
        {"objective": "past_future"},
    ),
    "one exit, learning to exit": ({"learn_to_exit": True}, {"objective": "single_exit", "depth": 3}),
    "without labels": ({"train_head": False}, {"distillation": 1.0, "labeled": False}),
    "without labels, learning to exit": ({"learn_to_exit": True}, {"distillation": 1.0, "labeled": False}),
}


def train(name: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every step over the same rows whatever the number of processes; two epochs where the second differs."""
    fields, options = TRAININGS[name]
    epochs = 2 if {"eval_strategy", "cache_states"} & options.keys() else 1
    options = dict(options)
    model = make(**fields)
    if options.pop("checkpoint", False):
        checkpoint(model, {"use_reentrant": False})
    data = Rows(rows=ROWS, labeled=options.pop("labeled", True))
    trainer = make_trainer(
        folder / name,
        model,
        data,
        per_device_train_batch_size=BATCH
        // distributed.env_rank_world()[1]
        // options.get("gradient_accumulation_steps", 1),
        max_steps=-1,
        num_train_epochs=epochs,
        **options,
    )
    before = weights(model)
    steps = trainer.train().global_step
    after = weights(model)
    changed = sum(not torch.equal(before[key], value) for key, value in after.items())
    return after, {"steps": steps, "changed": changed, "best": trainer.state.best_metric}


def stop_early(folder: Path) -> dict[str, Any]:
    """The scores cannot become better, so the second evaluation ends the training."""
    trainer = make_trainer(
        folder / "early",
        make(),
        Rows(rows=ROWS),
        early_stopping_patience=1,
        per_device_train_batch_size=BATCH // distributed.env_rank_world()[1],
        learning_rate=0.0,
        adapter_learning_rate=0.0,
        head_learning_rate=0.0,
        max_steps=20,
        **{**EACH_EPOCH, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    )
    trainer.train()
    return {"step": trainer.state.global_step, "best": Path(str(trainer.state.best_model_checkpoint)).name}


def evaluate(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Thirteen rows in batches of three, which no number of processes divides."""
    data = Rows(rows=13)
    trainer = make_trainer(folder / "evaluate", make(), data, per_device_eval_batch_size=3)
    trainer.eval_dataset = data
    scores = {k: v for k, v in trainer.evaluate().items() if not k.endswith(("runtime", "per_second", "time"))}
    found = trainer.predict(data)
    return {"predictions": torch.tensor(found.predictions), "labels": torch.tensor(found.label_ids)}, scores


def collect() -> dict[str, Tensor]:
    """The exit logits of data sets of several sizes; one row is fewer than there are processes."""
    model = make_exits(learn_to_exit=True)
    found: dict[str, Tensor] = {}
    for rows, batch_size in ((1, 4), (4, 4), (13, 4), (13, 1)):
        got = collect_exit_logits(model, make_rows(rows), batch_size, split_between_processes=True)
        assert got.labels is not None and got.uncertainty is not None
        kinds = {"logits": got.logits, "labels": got.labels, "signals": got.uncertainty}
        found |= {f"{rows} rows by {batch_size}: {kind}": value for kind, value in kinds.items()}
    unlabeled = collect_exit_logits(model, make_rows(5, labels=False), 2, split_between_processes=True)
    assert unlabeled.labels is None
    return {**found, "unlabeled": unlabeled.logits, "alone": collect_exit_logits(model, make_rows(13), 4).logits}


class Watched(Rows):
    """Notes which rows are asked for."""

    asked: list[int]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        self.asked.append(int(i))
        row = super().__getitem__(i)
        length = int(row["attention_mask"].sum())
        return {k: v[:length] if v.dim() else v for k, v in row.items()}


class NewEpoch(TrainerCallback):
    """Lets a data set begin a new list at each epoch."""

    def __init__(self, data: Watched) -> None:
        self.data, self.epochs = data, []  # type: ignore[var-annotated]

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.data.asked = []
        self.epochs.append(self.data.asked)


def by_length(folder: Path) -> list[list[int]]:
    """Which rows this process has trained on in each epoch, where dropout has used the process's own generator."""
    data = Watched(rows=32)
    data.asked = []
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    args = multi_exit_arguments(
        model,
        str(folder / "by length"),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    watch = NewEpoch(data)
    trainer = MultiExitTrainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=lambda rows: pad_features(rows, model.get_base_model()),
        callbacks=[watch],
    )
    trainer.train()
    return watch.epochs


def shared() -> dict[str, Any]:
    """What the main process has for the others, its errors too."""
    rank, size = distributed.rank_world()

    def fail() -> None:
        raise ValueError(f"as process {rank} found")

    try:
        distributed.on_main(fail)
        failure = ""
    except ValueError as error:
        failure = str(error)
    return {
        "told": distributed.on_main(lambda: f"by process {rank} of {size}"),
        "failure": failure,
        "gathered": distributed.gather(list(range(rank + 1))),
        "main": distributed.is_main(),
    }


def answer() -> dict[str, Any]:
    """Texts answered in shares: several numbers of them, a reader that stops, and a source that breaks."""
    model = make_exits()
    adapter = Adapter(model, make_tokenizer(), LabelSet(["a", "b", "c"], "single_label_classification"))
    read: list[int] = []

    def texts(count: int, breaks: bool = False) -> Iterator[tuple[str, None]]:
        for i, (text, _) in enumerate(sentences(count)):
            read.append(i)
            yield text, None
        if breaks:
            raise ValueError("line 6 is no text")

    rule = EarlyExitConfig(policy="max_prob", threshold=0.6)
    found: dict[str, Any] = {f"{n} texts": list(predict(adapter, texts(n), rule, 4)) for n in (0, 1, 8, 13)}
    with closing(predict(adapter, texts(100), rule, 4)) as answers:
        found["first of many"] = next(answers, None)
    some: list[Any] = []
    try:
        some.extend(predict(adapter, texts(5, breaks=True), rule, 1))
    except ValueError as error:
        found["broken"] = [str(error), len(some)]
    return {**found, "read": len(read)}


def work(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything, as tensors and as what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"trainings": {}}
    for name in TRAININGS:
        found, facts["trainings"][name] = train(name, folder)
        tensors |= {f"{name}: {key}": value for key, value in found.items()}
    facts["early stopping"] = stop_early(folder)
    found, facts["scores"] = evaluate(folder)
    tensors |= {f"trainer: {key}": value for key, value in found.items()}
    tensors |= {f"collected: {key}": value for key, value in collect().items()}
    facts["epochs"] = by_length(folder)
    facts["shared"] = shared()
    facts["answers"] = answer()
    return tensors, facts


def watch_writing(folder: Path) -> list[str]:
    """A list that fills with the files that this process opens to write below `folder`."""
    seen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, os.PathLike)) and args[2] & (os.O_WRONLY | os.O_RDWR):
            path = os.path.abspath(os.fspath(args[0]))
            if path.startswith(str(folder)):
                seen.append(path)

    sys.addaudithook(hook)
    return seen


def main(folder: Path) -> None:
    """What one of several processes runs."""
    torch.set_num_threads(1)
    gc.freeze()  # the libraries: each training starts with a full collection
    distributed.init_process_group()
    written = watch_writing(folder)
    tensors, facts = work(folder)
    rank = distributed.rank_world()[0]
    facts["written"] = list(written)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
