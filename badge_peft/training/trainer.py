"""`MultiExitTrainer`: transformers' Trainer with an objective, learning rates by part, and scores per exit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import PredictionOutput, TrainOutput, get_last_checkpoint

from badge_peft.early_exit.mixin import get_badge_model
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric, exit_scores
from badge_peft.model import BadgeModel
from badge_peft.training.objectives import EarlierExits, Objective, Step, make_objective
from badge_peft.training.parameters import parameter_groups
from badge_peft.training.preflight import check_evaluation, check_final_exit, check_processes
from badge_peft.training.sampling import same_order
from badge_peft.training.stopping import EarlyStopping
from badge_peft.tuner.full_depth import count_rows, full_depth_runs
from badge_peft.tuner.losses import check_labels, doubt_loss, resolve_problem_type

_NO_PREDICTIONS = ["exit_doubts", "hidden_states", "attentions"]


class MultiExitTrainer(Trainer):
    """Trains a BADGE adapter. Everything that `transformers.Trainer` takes, and:

    Args:
        objective: `joint` (Eq. 8), `two_stage`, `alternating`, `gradient_equilibrium`, `past_future` or `single_exit`;
            or an `Objective`. Source: appendix A.3 of the paper and the papers that each objective names.
        depth: The exit of `single_exit`.
        exit_weights: `uniform`, `linear` or a list; None takes the adapter's.
        distillation: Share of the loss of the exits below M that follows exit M and not the labels. 1 needs no labels.
            For `two_stage`, 0 is DeeBERT's second stage and 1 FastBERT's.
        distillation_temperature: T.
        adapter_learning_rate: Of bypasses and exits; None is 1e-2.
        head_learning_rate: Of the model's own head; None as in `parameter_groups`.
        metric: Of each exit, as for `exit_scores`; None is accuracy, for regression Pearson. The evaluation reports
            `eval_s_avg`, `eval_s_best`, `eval_final` and `eval_exit_<m>`; `metric_for_best_model` is `s_avg` when the
            arguments do not say (`exit_<depth>` for `single_exit`).
        early_stopping_patience: Evaluations without improvement before training stops; None never stops.

    `args.learning_rate` is the backbone's rate (or its LoRA's).
    """

    _quiet_backbone = False

    def __init__(
        self,
        *args: Any,
        objective: str | Objective = "joint",
        depth: int | None = None,
        exit_weights: str | list[float] | None = None,
        distillation: float = 0.0,
        distillation_temperature: float = 1.0,
        adapter_learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        metric: Metric | None = None,
        early_stopping_patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._user_metrics = kwargs.pop("compute_metrics", None)
        super().__init__(*args, **kwargs)
        self.compute_metrics = self._scores
        config = self.badge.config_of()
        options: dict[str, Any] = {
            "weights": exit_weights if exit_weights is not None else config.exit_weights,
            "distillation": distillation,
            "temperature": distillation_temperature,
        }
        if objective == "past_future" and exit_weights is None:
            options["weights"] = None  # GPF's own, by depth
        self.two_stage = objective == "two_stage"
        # not `self.objective`, in which Trainer keeps the result of a trial of its hyper-parameter search
        self.exit_objective: Objective = (
            objective if isinstance(objective, Objective) else make_objective(objective, depth, **options)
        )
        self._stages = (self.exit_objective, EarlierExits(**options))
        self.trains_final_exit = any(
            p.requires_grad and not self._is_earlier_exit(name) for name, p in self._module.named_parameters()
        )
        self._part: Callable[[str], bool] | None = None  # which parameters the running stage trains
        self._trainable: set[str] | None = None  # what both stages train, once the first has begun
        self.adapter_learning_rate = adapter_learning_rate
        self.head_learning_rate = head_learning_rate
        self.metric = metric
        self.model_accepts_loss_kwargs = False  # our losses are means over the batch; Trainer scales them
        if self.args.metric_for_best_model in (None, "loss") and self.args.eval_strategy != "no":
            self.args.metric_for_best_model = f"exit_{depth}" if objective == "single_exit" else "s_avg"
            self.args.greater_is_better = True
        if early_stopping_patience is not None:
            self.add_callback(EarlyStopping(early_stopping_patience))

    @property
    def badge(self) -> BadgeModel:
        """The tuner of the model that is trained now: a hyper-parameter search makes a new one for each trial."""
        return get_badge_model(self._module)

    @property
    def exits(self) -> list[int]:
        """Block numbers of its exits."""
        return self.badge.exit_layers()

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    # ------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's loss of one batch."""
        features = {k: v for k, v in inputs.items() if k != "labels"}
        labels = inputs.get("labels")
        config = self.badge.config_of()
        if labels is not None:
            config.problem_type = config.problem_type or resolve_problem_type(config.resolved_labels, labels)
            check_labels(labels, config.resolved_labels, config.resolved_problem_type, count_rows(**features))
        if self._quiet_backbone:
            self._silence(model)
        with full_depth_runs(self.exit_objective.run) as runs:
            outputs = model(**features)
        step = Step(
            self.exits,
            list(outputs.exit_logits.unbind(dim=1)),
            labels,
            config.resolved_problem_type,
            self.state.global_step,
            runs[0],
        )
        loss = self.exit_objective(step)
        doubt = runs[0].learn_to_exit
        if doubt is not None and labels is not None and any(p.requires_grad for p in doubt.parameters()):
            doubts = {m: u for m, u in runs[0].doubts.items() if self.exit_objective.judges(m)}
            if doubts:
                loss = loss + doubt_loss(doubts, runs[0].exit_logits, labels, config.resolved_problem_type)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The arguments' optimiser, with a learning rate for each part of the model."""
        if self.optimizer is None:
            if self._part is not None:
                self._select(self._part)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
            options.pop("lr", None)
            groups = parameter_groups(
                self._module,
                self.adapter_learning_rate,
                self.args.learning_rate,
                self.head_learning_rate,
                self.args.weight_decay,
            )
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return same_order(super()._get_train_sampler(*args, **kwargs), self.args)

    # ------------------------------------------------------------------------------------------------------ two stages

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains; `two_stage` runs both stages, each with a folder of its own in `output_dir`. A model whose backbone,
        head and final exit are all frozen has the second alone.

        With `resume_from_checkpoint=True` it goes on in the stage that was interrupted.

        Raises:
            ValueError: steps without a gradient lie ahead, or evaluations without labels, or several processes that do
                not know of one another.
        """
        check_processes(self)
        check_evaluation(self)
        if not self.two_stage:
            check_final_exit(self)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        home, best = str(self.args.output_dir), self.args.metric_for_best_model
        second = str(Path(home, "stage2"))
        self._trainable = None
        try:
            if not (resume_from_checkpoint and Path(second).is_dir() and get_last_checkpoint(second)):
                if self.trains_final_exit:
                    self._part = lambda name: not self._is_earlier_exit(name)
                    if self.args.load_best_model_at_end:
                        self.args.metric_for_best_model = "final"
                    self._stage(str(Path(home, "stage1")), resume_from_checkpoint, *args, **kwargs)
                    self.args.metric_for_best_model = best
                    self.save_model(str(Path(home, "stage1", "best")))
                resume_from_checkpoint = None
            self.exit_objective, self._part, self._quiet_backbone = self._stages[1], self._is_earlier_exit, True
            return self._stage(second, resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._trainable is not None:
                self._select(lambda name: True)
            self._part, self._quiet_backbone = None, False
            self.exit_objective = self._stages[0]
            self.args.output_dir, self.args.metric_for_best_model = home, best

    def call_model_init(self, trial: Any = None) -> Any:
        """In the second of two stages, the model of the first."""
        return self.model if self._quiet_backbone else super().call_model_init(trial)

    def _stage(self, folder: str, resume: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        self.args.output_dir = folder
        self.optimizer, self.lr_scheduler = None, None
        self.model_wrapped = cast(nn.Module, self.model)  # DDP knows what is trained from the moment that it is made
        if resume is True and not (Path(folder).is_dir() and get_last_checkpoint(folder)):
            resume = None
        return super().train(resume, *args, **kwargs)

    def _is_earlier_exit(self, name: str) -> bool:
        """Whether a parameter belongs to a bypass or an exit below M (or judges them, as LTE does)."""
        return ".badge_" in name and f".{self.exits[-1]}." not in name.partition(".badge_")[2]

    def _select(self, part: Callable[[str], bool]) -> None:
        """Of what both stages train, only `part` takes gradients."""
        if self._trainable is None:
            self._trainable = {name for name, p in self._module.named_parameters() if p.requires_grad}
        for name, parameter in self._module.named_parameters():
            parameter.requires_grad = name in self._trainable and part(name)

    def _silence(self, model: nn.Module) -> None:
        """Evaluation mode for all but the exits: a frozen teacher gives the same answer every time."""
        training = model.training
        for name, module in model.named_modules():
            module.training = training and ".badge_" in name

    # ---------------------------------------------------------------------------------------------------------- scores

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """As Trainer's, with the scores of all exits."""
        return super().evaluate(eval_dataset, [*(ignore_keys or []), *_NO_PREDICTIONS], metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        """As Trainer's: the logits of exit M; with labels, the scores of all exits beside them."""
        output = super().predict(test_dataset, [*(ignore_keys or []), *_NO_PREDICTIONS], metric_key_prefix)
        return output._replace(predictions=output.predictions[0])

    def _scores(self, prediction: EvalPrediction, **kwargs: Any) -> dict[str, float]:
        logits, exit_logits = cast(tuple[np.ndarray, ...], prediction.predictions)[:2]
        labels = torch.from_numpy(np.asarray(prediction.label_ids))
        config = self.badge.config_of()
        stored = ExitLogits(torch.from_numpy(exit_logits), labels, self.exits, config.resolved_problem_type)
        metric = self.metric or ("pearson" if config.resolved_problem_type == "regression" else "accuracy")
        scores = exit_scores(stored, metric)
        report = {"s_avg": scores.avg, "s_best": scores.best, "final": scores.per_exit[-1]}
        report.update({f"exit_{m}": s for m, s in zip(self.exits, scores.per_exit, strict=True)})
        if self._user_metrics is not None:
            report.update(self._user_metrics(EvalPrediction(logits, prediction.label_ids), **kwargs))
        return report
