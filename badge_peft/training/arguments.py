"""`MultiExitTrainingArguments`: transformers' TrainingArguments with what `MultiExitTrainer` adds to them, and the
paper's values of both, on transformers 4.57 and 5 alike."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from badge_peft.evaluation.metrics import METRIC_NAMES
from badge_peft.model import get_badge_model
from badge_peft.training.caching import CACHE_DTYPES, MEMORY_GB
from badge_peft.training.criterion import check_class_weights
from badge_peft.training.objectives import OBJECTIVES, make_objective
from badge_peft.training.parameters import BACKBONE_LR
from badge_peft.training.sampling import sampling
from badge_peft.tuner.losses import check_weights
from badge_peft.utils.checks import check_choice, check_int, check_number, option
from badge_peft.utils.distributed import on_cpu


@dataclass(repr=False)  # that of TrainingArguments hides tokens
class MultiExitTrainingArguments(TrainingArguments):
    """Arguments of `MultiExitTrainer`: those of `transformers.TrainingArguments`, where `learning_rate` is the rate of
    the backbone (or its LoRA), and the ones below.

    As fields they are saved with every checkpoint, parsed by `HfArgumentParser`, and set by
    `Trainer.hyperparameter_search` from what its `hp_space` returns.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    objective: str = option("joint", "What a step's loss is made of.", choices=OBJECTIVES)
    depth: int | None = option(None, "The exit of `single_exit`: a block number.")
    exit_weights: list[float] | str | None = option(  # in this order HfArgumentParser takes it for a string
        None, "Of the exits' losses: `uniform`, `linear` or a list, also as JSON; None = the adapter's."
    )
    class_weights: list[float] | None = option(
        None, "Weight of each class in the loss, K numbers (a tensor will do); None = all alike."
    )
    distillation: float = option(
        0.0, "Share of the loss of exits below M that follows exit M; with 1 no labels are needed."
    )
    distillation_temperature: float = option(1.0, "T of the distillation.")
    adapter_learning_rate: float | None = option(
        None, "Of bypasses and exits; None = 2.5e-3. `learning_rate` is the backbone's."
    )
    head_learning_rate: float | None = option(
        None,
        "Of the model's own head; None = the backbone's rate with backbone='full', else a tenth of the adapter's.",
    )
    exit_metric: str | None = option(
        None, "Score of each exit; None = accuracy, for regression Pearson's correlation."
    )
    early_stopping_patience: int | None = option(
        None, "Evaluations without improvement before training stops; None = never."
    )
    standardize: bool = option(
        True, "Optimize in coordinates in which what exits and bypasses read has mean 0 and deviation 1."
    )
    exit_start: str = option(
        "regression",
        "With a frozen backbone an exit's linear layer starts as a `regression` on what it reads, or `random`.",
        choices=("regression", "random"),
    )
    cache_states: str = option(
        "auto",
        "Frozen backbone: compute what exits read once, and train on it. True, False, or `auto`: where it can be.",
    )
    cache_dtype: str = option("float16", "As what these states are stored.", choices=tuple(CACHE_DTYPES))
    cache_memory_gb: float = option(
        MEMORY_GB, "Up to how many GB of them stay in memory; more go into a mapped file in `output_dir`."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Refuses what these fields may not hold. A search sets them afterwards, so `MultiExitTrainer` asks again
        before each training."""
        make_objective(self.objective, self.depth, distillation=self.distillation)
        check_int("depth", self.depth, at_least=0)
        check_int("early_stopping_patience", self.early_stopping_patience, at_least=1)
        check_number("distillation_temperature", self.distillation_temperature, lambda t: t > 0, "it must be positive")
        for name in ("adapter_learning_rate", "head_learning_rate"):
            check_number(name, getattr(self, name), lambda rate: rate >= 0, "it must be a number of at least 0")
        check_choice("exit_start", self.exit_start, ("regression", "random"))
        self.cache_states = _flag("cache_states", self.cache_states)
        check_choice("cache_dtype", self.cache_dtype, tuple(CACHE_DTYPES))
        check_number("cache_memory_gb", self.cache_memory_gb, lambda size: size >= 0, "it must be at least 0")
        if self.exit_metric is not None:
            check_choice("exit_metric", self.exit_metric, METRIC_NAMES)
        if self.exit_weights is not None:
            self.exit_weights = check_weights(from_json(self.exit_weights))
        if self.class_weights is not None:
            self.class_weights = check_class_weights(from_json(self.class_weights))

    @classmethod
    def of(cls, args: TrainingArguments | None = None, **overrides: Any) -> MultiExitTrainingArguments:
        """A copy of `args` (None: the defaults), plain TrainingArguments among them, with `overrides` that are not
        None in their place."""
        args = cls() if args is None else args
        new = cls.__new__(type(args) if isinstance(args, cls) else cls)
        given = {name: value for name, value in overrides.items() if value is not None}
        # as copy.copy does: their checks have been made, and the devices set up
        new.__dict__.update({**OWN_FIELDS, **vars(args), **given})
        new.check()
        return new


#: What `MultiExitTrainingArguments` adds to `TrainingArguments`: names and defaults.
OWN_FIELDS = {f.name: f.default for f in fields(MultiExitTrainingArguments)[len(fields(TrainingArguments)) :]}


def multi_exit_arguments(model: nn.Module, output_dir: str, **overrides: Any) -> MultiExitTrainingArguments:
    """Arguments as the paper trains (section 4.3): 10% warm-up, batches of similar length, an evaluation and a
    checkpoint after each epoch, the best by S-avg loaded at the end. Several processes without an accelerator train on
    their CPUs.

    Args:
        model: The PEFT model; its backbone mode says the backbone's learning rate.
        output_dir: Where checkpoints go.
        **overrides: Any field of `MultiExitTrainingArguments`, which wins.
    """
    options: dict[str, Any] = {
        "learning_rate": BACKBONE_LR[get_badge_model(model).config_of().backbone],
        "lr_scheduler_type": "linear",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "s_avg",
        "greater_is_better": True,
        "report_to": "none",
        "use_cpu": on_cpu(),
        "dataloader_pin_memory": torch.cuda.is_available(),  # without a GPU it only brings a warning
    }
    options |= sampling(by_length=True)
    options |= {"warmup_steps": 0.1} if "train_sampling_strategy" in options else {"warmup_ratio": 0.1}
    return MultiExitTrainingArguments(output_dir=output_dir, **{**options, **overrides})


def _flag(name: str, value: Any) -> Any:
    """True, False or "auto"; the first two also as words, from a command line."""
    words = {"true": True, "false": False, "auto": "auto"}
    if str(value).lower() not in words:
        raise ValueError(f"{name}={value!r} is not allowed: it must be True, False or 'auto'.")
    return words[str(value).lower()]


def from_json(weights: Any) -> Any:
    """A list that came as a string, from a command line; anything else as it is."""
    if isinstance(weights, str) and weights.startswith("["):
        with suppress(json.JSONDecodeError):
            return json.loads(weights)
    return weights
