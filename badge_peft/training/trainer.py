"""`MultiExitTrainer`: transformers' Trainer with an objective, learning rates by part, and scores per exit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import EvalPrediction, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PredictionOutput, TrainOutput

from badge_peft.early_exit.arguments import input_size
from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.early_exit.full_depth import check_labels
from badge_peft.evaluation.collate import evaluating
from badge_peft.evaluation.metrics import Metric, exit_scores
from badge_peft.model import BadgeModel, get_badge_model
from badge_peft.training import preflight
from badge_peft.training.arguments import OWN_FIELDS, MultiExitTrainingArguments
from badge_peft.training.callbacks import AtFirstStep, EarlyStopping
from badge_peft.training.conditioning import Conditioning
from badge_peft.training.criterion import Criterion, rows_of_loss, rows_of_scores
from badge_peft.training.objectives import GROUPS, Objective, Step, make_objective
from badge_peft.training.parameters import parameter_groups
from badge_peft.training.ranking import holds_batches
from badge_peft.training.stages import Stage, check_final_stays, is_earlier_exit, make_stages, stages_left
from badge_peft.training.start import START_BATCH, start_exits
from badge_peft.training.state_cache import CachingTrainer, StateCache, has_rows, without_unused_columns
from badge_peft.tuner.backbone import is_trained
from badge_peft.tuner.config import own_exits
from badge_peft.tuner.losses import uncertainty_loss
from badge_peft.utils.problem import problem_of

_NO_PREDICTIONS = ["exit_uncertainty", "imitation_loss", "hidden_states", "attentions"]


class MultiExitTrainer(CachingTrainer):
    """Trains a BADGE adapter. Everything that `transformers.Trainer` takes, where `args` may be
    `MultiExitTrainingArguments` or plain ones.

    Args:
        objective: `joint` (Eq. 8), `two_stage`, `alternating`, `gradient_equilibrium`, `past_future` or `single_exit`;
            or an `Objective`. Source: appendix A.3 of the paper and the papers that each objective names.
        metric: Of each exit, as for `exit_scores` (`args.exit_metric`, or a function); by default accuracy, for
            regression Pearson. The evaluation reports `eval_s_avg`, `eval_s_best`, `eval_final` and `eval_exit_<m>`;
            `metric_for_best_model` is `s_avg` when the arguments do not say (`exit_<depth>` for `single_exit`); `loss`
            is what transformers says where nobody does, so for the loss itself write `eval_loss`.
        cache_states: With a frozen backbone in evaluation mode, what exits read of a row is the same in every epoch:
            it is computed once and kept. "auto", where it can be; True; False; or states of these rows, as
            `badge_peft.cache_states` makes them, for one more adapter on the same texts.
        **kwargs: Of `transformers.Trainer`, and the other fields that `MultiExitTrainingArguments` adds to
            `TrainingArguments` (`depth`, `exit_weights`, `distillation`, `adapter_learning_rate`, ...), in place of
            those of `args`; None leaves what `args` have. `label_smoothing_factor`, `class_weights` and
            `compute_loss_func` are those of every exit's loss.

    `self.args` is a copy of `args` with all of these in it, read anew by each training.

    Raises:
        ValueError: an argument has a value that is not allowed, or does not fit the model's exits.
    """

    _has_trained = False
    _conditioning: Conditioning | None = None

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        objective: str | Objective | None = None,
        metric: Metric | None = None,
        cache_states: str | bool | CachedStates | None = None,
        **kwargs: Any,
    ) -> None:
        self._own_objective = objective if isinstance(objective, Objective) else None
        self._own_metric = None if isinstance(metric, str) else metric
        fields = {name: kwargs.pop(name) for name in OWN_FIELDS.keys() & kwargs.keys()}
        if isinstance(objective, str):
            fields["objective"] = objective
        if isinstance(metric, str):
            fields["exit_metric"] = metric
        given = cache_states if isinstance(cache_states, CachedStates) else None
        fields["cache_states"] = cache_states if given is None else True
        self._cache = StateCache(given)
        super().__init__(model, MultiExitTrainingArguments.of(args, **fields), *others, **kwargs)
        self._user_metrics, self.compute_metrics = self.compute_metrics, self._scores
        preflight.check_options(self.args, self.optimizer_cls_and_kwargs)
        self._given_optimizer = self.optimizer is not None or self.lr_scheduler is not None
        self.model_accepts_loss_kwargs = False  # our losses are means over the batch; Trainer scales them
        self._chooses_metric = self.args.metric_for_best_model in (None, "loss") and self.args.eval_strategy != "no"
        self._choose_metric()
        for stage in self._stages():
            stage.objective.check(self.badge.config_of(), self.exits)
        self.add_callback(EarlyStopping())
        self.add_callback(AtFirstStep(self._start_exits))

    @property
    def badge(self) -> BadgeModel:
        """The tuner of the model that is trained now: a hyper-parameter search makes a new one for each trial."""
        return get_badge_model(self._module)

    @property
    def exits(self) -> list[int]:
        """Block numbers of its exits."""
        return self.badge.exit_layers()

    @property
    def exit_objective(self) -> Objective:
        """The objective of the stage that runs, or would run first."""
        # not `objective`, in which Trainer keeps the result of a trial of its hyper-parameter search
        return (self._stage or self._stages()[0]).objective

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _stages(self) -> list[Stage]:
        return make_stages(self.args, self.badge.config_of().exit_weights, self._own_objective)

    def _choose_metric(self) -> None:
        """By which score checkpoints are compared, where the arguments leave it open."""
        if self._chooses_metric:
            # between two trials of a search there is no model to ask for stages
            own = self._own_objective or make_objective(self.args.objective, self.args.depth)
            self.args.metric_for_best_model = own.best_by
            self.args.greater_is_better = True

    # ------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's loss of one batch."""
        features = {k: v for k, v in inputs.items() if k not in ("labels", GROUPS)}
        labels = inputs.get("labels")
        if labels is not None:
            check_labels(self.badge.config_of(), labels, *input_size(**features))
        training = model.training
        if self._stage is not None:
            self._stage.set_modes(model, self.exits[-1])
        objective = self.exit_objective
        outputs = model(**features, **self._cache.find(features), exit_pass=objective.exit_pass)
        config, exits = self.badge.config_of(), self.exits
        logits, labels, uncertainties = rows_of_loss(
            outputs.exit_logits, outputs.exit_uncertainty, labels, features.get("attention_mask"), config
        )
        problem_type = config.resolved_problem_type
        number, criterion = self.state.global_step, self._criterion()
        loss = objective(
            Step(exits, logits, labels, problem_type, number, outputs, criterion, inputs.get(GROUPS), training)
        )
        if training:
            preflight.check_loss(loss, self.state.global_step + 1)
        if labels is not None and uncertainties is not None and self._trains_uncertainty():
            taught = [m for m in own_exits(config, exits[-1]) if objective.trains_lte_at(m)]
            if taught:
                uncertainty = {m: uncertainties[:, exits.index(m)] for m in taught}
                own_logits = {m: logits[exits.index(m)] for m in taught}
                loss = loss + uncertainty_loss(uncertainty, own_logits, labels, problem_type)
        return (loss, outputs) if return_outputs else loss

    @property
    def compute_loss_func(self) -> None:
        """None: Trainer would leave the mean over accumulated batches to it. `Criterion` has the function."""
        return None

    @compute_loss_func.setter
    def compute_loss_func(self, function: Any) -> None:
        self._loss_function = function

    def _criterion(self) -> Criterion:
        """The loss of one exit against labels, once it is known that the objective honors all that was asked for."""
        args, config = self.args, self.badge.config_of()
        criterion = Criterion(args.label_smoothing_factor, args.class_weights, self._loss_function)
        criterion.check(config.resolved_problem_type, config.resolved_labels, self.exit_objective.reads_labels)
        return criterion

    def _start_exits(self) -> None:
        """With a frozen backbone, brings the exits to where a regression on what they read stands."""
        is_wanted = self.args.exit_start == "regression" and has_rows(self.train_dataset)
        if not is_wanted or is_trained(self.badge.model, self.badge.layout):
            return
        if self._conditioning is not None:
            self._conditioning.forget()  # a check of cached states, which runs without them would not have
        with evaluating(self._module):
            rows, collate = without_unused_columns(self, self.train_dataset)
            draw = torch.Generator().manual_seed(self.args.seed)
            order = torch.randperm(len(rows), generator=draw).tolist()
            size = 1 if holds_batches(rows) else START_BATCH
            loader = DataLoader(Subset(rows, order), size, collate_fn=collate)
            batches = ({**batch, **self._cache.find(batch)} for batch in map(self._prepare_inputs, loader))
            start_exits(self.badge, self.exit_objective, batches, self._criterion())

    def _trains_uncertainty(self) -> bool:
        """Whether the layer of learning to exit (LTE) takes gradients."""
        layer = self.badge.adapter_exits(self.badge.single_active_adapter()).uncertainty
        return layer is not None and any(p.requires_grad for p in layer.parameters())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The arguments' optimizer or `optimizer_cls_and_kwargs`, with a learning rate for each part of the model."""
        if self.optimizer is not None:
            return self.optimizer
        own, model = self.args, self._module
        cls, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(own, cast(Any, model))
        rates = (own.adapter_learning_rate, own.learning_rate, own.head_learning_rate)
        groups = parameter_groups(model, *rates, weight_decay=own.weight_decay)
        self.optimizer = cls(groups, **{name: value for name, value in options.items() if name != "lr"})
        self._conditioning = None
        if own.standardize and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._conditioning = Conditioning(self.badge, self.optimizer)
        return self.optimizer

    # ---------------------------------------------------------------------------------------------------------- stages

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains; `two_stage` runs both stages, each with a folder of its own in `output_dir`. A model whose backbone,
        head and final exit are all frozen has the second alone.

        With `resume_from_checkpoint=True` it goes on in the stage that was interrupted.

        Raises:
            ValueError: steps without a gradient lie ahead, or evaluations without labels, label smoothing, class
                weights or a loss function that nothing would read, a best checkpoint that holds no weights of the
                adapter, an optimizer of your own for a training in stages, or several processes that do not know of
                one another; or a trial of a search has set a field to a value that is not allowed.
        """
        self._hp_search_setup(trial)  # a trial may choose the objective; Trainer sets the same values again
        self.args.check()
        self._choose_metric()
        if self.model_init is not None:
            set_seed(self.args.seed)
            self.model = super().call_model_init(trial)
        self._criterion()
        preflight.check_evaluation(self.args, self.eval_dataset, self.label_names, self.get_eval_dataloader)
        stages, exits = self._stages(), self.exits
        trains_final_exit = any(
            p.requires_grad and not is_earlier_exit(name, exits[-1]) for name, p in self._module.named_parameters()
        )
        if len(stages) > 1 and not trains_final_exit:
            stages = stages[1:]
        stages, adapter = stages_left(stages, self.args, resume_from_checkpoint), self.badge.single_active_adapter()
        preflight.check_training(self.args, adapter, self._given_optimizer and bool(stages[0].folder))
        for stage in stages:
            stage.objective.check(self.badge.config_of(), exits)
            preflight.check_final_exit(stage.objective, exits, trains_final_exit)
        check_final_stays(stages, self._module, adapter, exits[-1])
        if self._has_trained and not self._given_optimizer:
            self.optimizer = None  # it has the rates, and maybe the part of the parameters, of the training before
        self.num_stages = len(stages)
        try:
            for stage in stages:
                resume = stage.resume(self.args, resume_from_checkpoint)
                with self._running(stage):
                    output = super().train(resume, trial, *args, **kwargs)
                    preflight.check_parameters(self._module, self.state.global_step)
                    if stage is not stages[-1]:
                        self.save_model(str(Path(str(self.args.output_dir), "best")))
                resume_from_checkpoint = None
        finally:
            self._has_trained = True
            self._cache.close()
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. The state of a trainer, which is the last file of a checkpoint and says that the others are
        whole, goes first where an older training left one."""
        if _internal_call and output_dir is not None and self.args.should_save:
            Path(output_dir, TRAINER_STATE_NAME).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)

    def call_model_init(self, trial: Any = None) -> Any:
        """While a training runs, the model that it began with."""
        return super().call_model_init(trial) if self._stage is None else self.model

    @contextmanager
    def _running(self, stage: Stage) -> Iterator[None]:
        """The trainer with the arguments of `stage`, on the parameters that it trains."""
        args, chosen_on = self.args, preflight.chosen_set(self.args.metric_for_best_model, self.eval_dataset)
        self.args, self._stage = stage.arguments(args, chosen_on), stage
        if stage.folder:
            self.optimizer, self.lr_scheduler = None, None
            self.model_wrapped = self._module  # DDP knows what is trained from the moment that it is made
        try:
            with stage.selected(self._module, self.exits[-1]):
                yield
        finally:
            self.args, self._stage = args, None

    # ---------------------------------------------------------------------------------------------------------- scores

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As Trainer's: the logits of exit M; with labels, the scores of all exits, too."""
        output = super().predict(*args, **kwargs)
        return output._replace(predictions=output.predictions[0])

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """As Trainer's. Logits of tokens come as [B, S, E, K]: Trainer fills up the second dimension, and no other."""
        ignored = [*(ignore_keys or []), *_NO_PREDICTIONS]
        found: Any  # whatever Trainer types it as, of several outputs it is a tuple
        loss, found, labels = super().prediction_step(model, inputs, prediction_loss_only, ignored)
        if found is not None and self.badge.config_of().reads_tokens:
            found = (found[0], found[1].transpose(1, 2), *found[2:])
        return loss, found, labels

    def _scores(self, prediction: EvalPrediction, **kwargs: Any) -> dict[str, float]:
        logits, exit_logits = cast(tuple[np.ndarray, ...], prediction.predictions)[:2]
        config, label_ids = self.badge.config_of(), cast(np.ndarray, prediction.label_ids)
        stored = rows_of_scores(exit_logits, label_ids, self.exits, config, self.badge.label_names())
        metric = self._own_metric or self.args.exit_metric or problem_of(config.resolved_problem_type).default_metric
        scores = exit_scores(stored, metric)
        report = {"s_avg": scores.avg, "s_best": scores.best, "final": scores.per_exit[-1]}
        report.update({f"exit_{m}": s for m, s in zip(self.exits, scores.per_exit, strict=True)})
        if self._user_metrics is not None:
            own = EvalPrediction(logits, prediction.label_ids, prediction.inputs, prediction.losses)
            report.update(self._user_metrics(own, **kwargs))
        return report
