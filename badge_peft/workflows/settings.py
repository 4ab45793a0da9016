"""`TrainSettings`: from what, and how, `train_adapter` makes an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from badge_peft.early_exit.config import POLICY_NAMES
from badge_peft.evaluation.metrics import METRICS
from badge_peft.training.objectives import OBJECTIVES
from badge_peft.tuner.config import PROBLEM_TYPES, BadgeConfig
from badge_peft.utils.checks import is_number, one_of, whole


@dataclass
class TrainSettings:
    """Settings of `train_adapter`; `badge-peft train` has an option for each.

    Args:
        model: Folder or Hub repository of a classifier, or of an encoder that is to become one.
        data: Texts, labelled or not: see `read_rows`.
        output_dir: Gets the adapter with everything else.
        eval_data: Texts to calibrate on; None holds out `eval_share` of `data`.
        eval_share: See `eval_data`.
        text_column: None finds it.
        text_pair_column: Column of the second texts; None where each row has one text.
        label_column: None finds it; there may be none.
        unlabelled: Learn from the model's own answers even where there are labels.
        split: Of `data`.
        eval_split: Of `eval_data`, or of `data` where that is a data set with splits.
        dataset_config: Configuration of a Hub data set.
        max_rows: At most this many rows of `data`, drawn at random.
        tokenizer: Folder or repository; None takes the model's.
        max_length: Tokens per text; None takes what the model can read.
        problem_type: As transformers has it; None as the model or the labels say.
        backbone: `frozen`, `lora` or `full`.
        keep_head: Leave the model's own head as it is: full depth then answers as before, bit for bit, when the
            backbone is frozen.
        final_exit: None takes `base_head` where the model has a trained head, else `exit`.
        badge: More fields of `BadgeConfig`.
        objective: As for `MultiExitTrainer`.
        depth: The exit of `single_exit`.
        distillation: Share of the loss that follows the model's own answers; None is 0 with labels, 1 without.
        epochs: Passes over the training rows.
        adapter_lr: Learning rate of bypasses and exits; None as in `parameter_groups`.
        backbone_lr: Of the backbone or its LoRA; None as in `parameter_groups`.
        batch_size: Rows per step.
        seed: Of the split, the weights and the order of training.
        metric: None is accuracy, for regression Pearson.
        policy: Which rules to search.
        max_score_drop: See `calibrate`; 0.01 when neither this nor `target_speedup` is given.
        target_speedup: See `calibrate`.
        confidence: See `calibrate`.
        latency: How many evaluation rows to time, one by one; 0 for none.
        overwrite: Write into a folder that is not empty.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    model: str
    data: str
    output_dir: str | Path
    eval_data: str | None = None
    eval_share: float = 0.2
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    unlabelled: bool = False
    split: str | None = None
    eval_split: str | None = None
    dataset_config: str | None = None
    max_rows: int | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    problem_type: str | None = None
    backbone: str = "frozen"
    keep_head: bool = False
    final_exit: str | None = None
    badge: dict[str, Any] | None = None
    objective: str = "joint"
    depth: int | None = None
    distillation: float | None = None
    epochs: int = 3
    adapter_lr: float | None = None
    backbone_lr: float | None = None
    batch_size: int = 32
    seed: int = 0
    metric: str | None = None
    policy: str = "auto"
    max_score_drop: float | None = None
    target_speedup: float | None = None
    confidence: float | None = None
    latency: int = 100
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_rows"):
            whole(name, getattr(self, name), at_least=1)
        whole("max_length", self.max_length, at_least=4)
        whole("seed", self.seed, at_least=0)
        whole("latency", self.latency, at_least=0)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("policy", self.policy, ("auto", *POLICY_NAMES))
        if self.metric is not None:
            one_of("metric", self.metric, tuple(METRICS))
        if self.problem_type is not None:
            one_of("problem_type", self.problem_type, PROBLEM_TYPES)
        for name in ("adapter_lr", "backbone_lr"):
            rate = getattr(self, name)
            if rate is not None and (not is_number(rate) or rate <= 0):
                raise ValueError(f"{name}={rate!r} is not allowed: it must be a number above 0.")
        if self.distillation is not None and (not is_number(self.distillation) or not 0 <= self.distillation <= 1):
            raise ValueError(f"distillation={self.distillation!r} is not allowed: it is a share, in [0, 1].")
        for name in ("confidence", "eval_share"):
            share = getattr(self, name)
            if share is not None and (not is_number(share) or not 0 < share < 1):
                raise ValueError(f"{name}={share!r} is not allowed: it must lie between 0 and 1.")
        if self.max_score_drop is not None and self.target_speedup is not None:
            raise ValueError("max_score_drop and target_speedup are two goals: give one of them.")
        if self.max_score_drop is None and self.target_speedup is None:
            self.max_score_drop = 0.01
        if self.objective == "two_stage" and self.backbone == "frozen" and self.keep_head:
            raise ValueError(
                "objective='two_stage' first trains the backbone and the final exit, and backbone='frozen' with "
                "keep_head leaves both as they are: use objective='joint'."
            )
        if self.keep_head and self.final_exit == "exit":
            raise ValueError("final_exit='exit' puts an exit in the place of the model's head: leave out keep_head.")
        self._check_goal()
        self.badge_config(self.final_exit or "base_head")

    def _check_goal(self) -> None:
        if self.max_score_drop is not None and (not is_number(self.max_score_drop) or self.max_score_drop < 0):
            raise ValueError(f"max_score_drop={self.max_score_drop!r} is not allowed: it must be 0 or more.")
        if self.target_speedup is not None and (
            not is_number(self.target_speedup) or not 0 <= self.target_speedup < 1
        ):
            raise ValueError(
                f"target_speedup={self.target_speedup!r} is not allowed: it is the share of blocks saved, in [0, 1)."
            )

    @property
    def goal(self) -> dict[str, float]:
        """What `calibrate` is asked for."""
        wanted = {"max_score_drop": self.max_score_drop, "target_speedup": self.target_speedup}
        wanted["confidence"] = self.confidence
        return {name: value for name, value in wanted.items() if value is not None}

    def badge_config(self, final_exit: str, **fields: Any) -> BadgeConfig:
        """The adapter's config.

        Raises:
            ValueError: a field that `BadgeConfig` does not allow.
        """
        own = {"backbone": self.backbone, "train_head": not self.keep_head, "final_exit": final_exit, **fields}
        badge = dict(self.badge or {})
        if badge.get("exit_type") == "past_future":
            own["final_exit"] = "exit"
        return BadgeConfig(task_type="SEQ_CLS", **{**badge, **own})
