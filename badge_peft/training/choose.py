"""`choose_exits`: which form of exits suits a model and its texts, by measurement on one caching pass.

Pooling, exit 0 and attention decide more than any learning rate, and no form is best everywhere. Each is trained on a
part of the rows, calibrated on others, and timed on this machine.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PrinterCallback, set_seed

from badge_peft.early_exit.cached_states import CachedStates, texts_of
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.state_passes import RecordingPass
from badge_peft.evaluation import collect_exit_logits, exit_scores
from badge_peft.evaluation.calibration import calibrate
from badge_peft.evaluation.costs import CostModel, measure_costs
from badge_peft.evaluation.metrics import Metric
from badge_peft.evaluation.tradeoff import evaluate_policy
from badge_peft.model import get_badge_model
from badge_peft.training.arguments import multi_exit_arguments
from badge_peft.training.caching import CannotCache, cache_states
from badge_peft.training.preflight import TrainingStopped
from badge_peft.training.trainer import MultiExitTrainer
from badge_peft.tuner.backbone import is_trained
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils.logs import quiet

MAX_ROWS = 2500
MAX_EVAL = 1000
HELD_OUT = 0.4
EPOCHS = 2
TIMED_S = 1.5  # seconds of timing for each form


@dataclass(frozen=True)
class ExitForm:
    """One form of exits on the rows that were held out.

    Args:
        config: Of the adapter.
        early_exit: How it stops, calibrated there.
        per_exit: The score of each exit, shallow to deep.
        exit_layers: Their block numbers.
        score: Of early answers.
        full_depth_score: Of the model at full depth.
        blocks_saved: The share of blocks saved.
        time_saved: The share of the time saved, by `costs`.
        costs: Of a call.
        seconds: What the trial took.
        reached: Whether the goal was reached.
    """

    config: BadgeConfig
    early_exit: EarlyExitConfig
    per_exit: list[float]
    exit_layers: list[int]
    score: float
    full_depth_score: float
    blocks_saved: float
    time_saved: float
    costs: CostModel = field(repr=False)
    seconds: float = 0.0
    reached: bool = True


def choose_exits(
    model: nn.Module,
    dataset: Any,
    configs: Sequence[BadgeConfig],
    *,
    eval_dataset: Any = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    goal: dict[str, Any] | None = None,
    policy: str = "auto",
    metric: Metric = "accuracy",
    max_rows: int = MAX_ROWS,
    epochs: int = EPOCHS,
    seed: int = 0,
    tell: Callable[[ExitForm], None] | None = None,
    **arguments: Any,
) -> list[ExitForm]:
    """Trains each form of exits on a part of the rows, and says what it saves on others.

    Args:
        model: A model of transformers without adapters; it is as before afterwards.
        dataset: Tokenized rows, with `labels`; without them exits follow full depth (`distillation=1.0`).
        configs: The forms.
        eval_dataset: Rows to choose by, at most `MAX_EVAL`; None: two fifths of those of the trial, no text in both.
        data_collator: Makes a batch of rows; None pads with the model's `pad_token_id`.
        goal: As for `calibrate`: `max_score_drop`, `target_blocks_saved` or `target_time_saved`; None is a drop of
            0.01. With a drop the form that saves most time is best, with a target the one that scores most.
        policy: As for `calibrate`.
        metric: As for `exit_scores`.
        max_rows: Rows of the trial.
        epochs: Of the trial.
        seed: Of the rows, the weights and the order.
        tell: Is given each form once it has been tried.
        **arguments: Of `MultiExitTrainingArguments`, such as `distillation` or `per_device_train_batch_size`.

    Returns:
        The forms, the best first.

    Raises:
        ValueError: there are no configs, or too few rows, or no form could be trained.
    """
    if not configs:
        raise ValueError("there are no configs to choose among: give at least one BadgeConfig.")
    goal = {"max_score_drop": 0.01} if goal is None else goal
    sets = _parts(dataset, eval_dataset, max_rows, seed)
    found: list[ExitForm] = []
    failure: Exception | None = None
    options = {**arguments, "num_train_epochs": epochs, "seed": seed}
    with closing(_Trials(model, sets, data_collator, {"policy": policy, "metric": metric, **goal}, options)) as trials:
        for config in sorted(configs, key=_demand, reverse=True):
            try:
                form = trials.run(config)
            except (TrainingStopped, CannotCache) as error:
                failure = error
                continue
            found.append(form)
            if tell is not None:
                tell(form)
    if not found:
        raise ValueError(f"no form of exits could be trained: {failure}") from failure
    by_time = goal.get("max_score_drop") is not None
    return sorted(found, key=lambda f: (f.reached, f.time_saved if by_time else f.score, f.score), reverse=True)


def _parts(dataset: Any, eval_dataset: Any, max_rows: int, seed: int) -> list[Any]:
    """Rows to train on, and rows to choose by."""
    draw = torch.Generator().manual_seed(seed)
    texts = texts_of(dataset)
    order = torch.randperm(len(texts), generator=draw).tolist()[:max_rows]
    if eval_dataset is not None:
        held = torch.randperm(len(eval_dataset), generator=draw).tolist()[:MAX_EVAL]
        sets = [dataset.select(order), eval_dataset.select(held)]
    else:
        apart = {texts[i] for i in order[: round(HELD_OUT * len(order))]}
        sets = [dataset.select([i for i in order if (texts[i] in apart) is part]) for part in (False, True)]
    if min(map(len, sets)) < 2:
        raise ValueError(f"{len(texts)} rows are too few to choose by: give more, or name one form.")
    return sets


def _demand(config: BadgeConfig) -> tuple[bool, bool, int]:
    """Forms that read more come first, so that one caching pass serves all."""
    return config.exit_type in ("mha", "residual_mha"), config.exit_pooling == "mean", len(config.exit_layers or ())


@dataclass
class _Trials:
    """What all forms are tried on: a model, rows to train on and to choose by, with their states for as long as these
    serve the forms that ask, what `calibrate` is asked for, and arguments of the trainings."""

    base: nn.Module
    sets: list[Any]
    collate: Any
    wanted: dict[str, Any]
    options: dict[str, Any]
    kept: CachedStates | None = None

    def close(self) -> None:
        """Gives memory and files back."""
        if self.kept is not None:
            self.kept.close()
        self.kept = None

    def states(self, model: nn.Module) -> CachedStates | None:
        """Those that the active adapter reads; None where the backbone is trained."""
        badge = get_badge_model(model)
        if is_trained(badge.model, badge.layout):
            return None
        if self.kept is None or not self.kept.plan.serves(RecordingPass.of(badge, {}).plan):
            self.close()
            rows = [row for part in self.sets for row in part]
            try:
                self.kept = cache_states(model, rows, data_collator=self.collate)
            except CannotCache:  # states of some models are too large for float16
                self.kept = cache_states(model, rows, data_collator=self.collate, dtype="float32")
        return self.kept

    def run(self, config: BadgeConfig) -> ExitForm:
        """Trains, times and calibrates one form."""
        start = time.perf_counter()
        set_seed(self.options["seed"])
        with quiet():
            model = get_peft_model(self.base, copy.deepcopy(config))
        badge = get_badge_model(model)
        try:
            states = self.states(model)
            self._train(model, states)
            exit_logits = collect_exit_logits(model.eval(), self.sets[1], cached_states=states)
            costs = measure_costs(model, self.sets[1], seconds=TIMED_S)
        finally:
            badge.unload()
        scored, metric = exit_logits.labeled(), self.wanted["metric"]
        scores, reached = exit_scores(scored, metric), True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                chosen = calibrate(exit_logits, costs=costs, **self.wanted)
            except ValueError:  # the goal is out of reach
                chosen, reached = EarlyExitConfig(policy="never"), False
        point = evaluate_policy(scored, chosen, metric)
        return ExitForm(
            config,
            chosen,
            scores.per_exit,
            scores.exit_layers,
            point.score,
            scores.per_exit[-1],
            point.blocks_saved,
            (chosen.calibration or {}).get("time_saved", 0.0),
            costs,
            time.perf_counter() - start,
            reached,
        )

    def _train(self, model: nn.Module, states: CachedStates | None) -> None:
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            arguments = multi_exit_arguments(
                model,
                folder,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
                logging_steps=10**9,
                label_names=["labels"],
                disable_tqdm=True,
                **self.options,
            )
            trainer = MultiExitTrainer(
                model,
                arguments,
                train_dataset=self.sets[0],
                data_collator=self.collate,
                cache_states=False if states is None else states,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
