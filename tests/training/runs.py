"""Tiny data sets and trainers for the tests of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from badge_peft.training import MultiExitTrainer
from tests.models import make_badge, make_batch, make_labels, make_model

ROWS = 8
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = [(SINGLE, 3), (MULTI, 3), (REGRESSION, 1)]


class Rows(Dataset):
    """Random rows with random labels, each row a dict as a tokenizer gives it."""

    def __init__(
        self, problem_type: str = SINGLE, num_labels: int = 3, labeled: bool = True, rows: int = ROWS
    ) -> None:
        self.batch = make_batch(rows=rows)
        self.labels = make_labels(problem_type, rows=rows, num_labels=num_labels)
        self.labeled = labeled

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = {name: value[i] for name, value in self.batch.items()}
        return {**row, "labels": self.labels[i]} if self.labeled else row


def make(problem_type: str = SINGLE, num_labels: int = 3, case: str = "bert", **fields: Any) -> Any:
    """A PEFT model to train, without dropout: equal calls give equal weights."""
    base = make_model(case, num_labels=num_labels, problem_type=problem_type)
    torch.manual_seed(6)
    return make_badge(case, base, **{"exit_dropout": 0.0, **fields})


def arguments(path: Path, **changes: Any) -> TrainingArguments:
    """Plain SGD at a constant rate, all rows in one batch, so that a loop by hand is easy to write."""
    defaults: dict[str, Any] = {
        "output_dir": str(path),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**defaults, **changes})


def make_trainer(path: Path, model: Any, data: Any = None, **options: Any) -> MultiExitTrainer:
    """A trainer, which evaluates on `data`, too, where there is no `eval_dataset`."""
    data = Rows() if data is None else data
    plain = {name: options.pop(name) for name in TrainingArguments.__dataclass_fields__.keys() & options.keys()}
    own: dict[str, Any] = {
        "train_dataset": data,
        "eval_dataset": data,
        "adapter_learning_rate": 0.1,
        "standardize": False,  # as in a loop by hand
        "exit_start": "random",
        "cache_states": False,  # float16 would round; test_caching.py has the others
    }
    return MultiExitTrainer(model, arguments(path, **plain), **{**own, **options})


def weights(model: Any) -> dict[str, Tensor]:
    """Every parameter that an adapter's file may hold."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if ".original_module." not in name and "embeddings" not in name
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that have changed."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All parameters, to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


#: Evaluated and saved after each step; the best is loaded at the end.
EACH_STEP: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def scripted(scores: list[list[float]]) -> Any:
    """A metric that gives these scores, a list of one per exit for each evaluation."""
    found = iter([score for of_exits in scores for score in of_exits])
    return lambda predictions, labels: next(found)


class Stop(TrainerCallback):
    """Ends the process, as it were, behind a step of a stage (a folder name)."""

    def __init__(self, step: int, folder: str = "") -> None:
        self.step, self.folder = step, folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.output_dir.endswith(self.folder):
            raise KeyboardInterrupt


def kl(teacher: Tensor, student: Tensor, problem_type: str, temperature: float) -> float:
    """T^2 KL(teacher || student), number by number."""
    total = 0.0
    for t_row, s_row in zip((teacher / temperature).tolist(), (student / temperature).tolist(), strict=True):
        if problem_type == SINGLE:
            p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (t_row, s_row))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        else:
            for t, s in zip(t_row, s_row, strict=True):
                p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
                total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total / len(teacher) * temperature**2
