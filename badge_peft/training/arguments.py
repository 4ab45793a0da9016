"""`multi_exit_arguments`: TrainingArguments with the paper's settings, on transformers 4.57 and 5 alike."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from badge_peft.early_exit.mixin import get_badge_model
from badge_peft.training.parameters import BACKBONE_LR
from badge_peft.utils.distributed import on_cpu


def multi_exit_arguments(model: nn.Module, output_dir: str, **overrides: Any) -> TrainingArguments:
    """TrainingArguments as the paper trains (section 4.3): 10% warm-up, batches of similar length, an evaluation and a
    checkpoint after each epoch, the best by S-avg loaded at the end. Several processes without an accelerator train on
    their CPUs.

    Args:
        model: The PEFT model; its backbone mode says the backbone's learning rate.
        output_dir: Where checkpoints go.
        **overrides: Any argument of `TrainingArguments`, which wins.
    """
    known = {f.name for f in fields(TrainingArguments)}
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
    if "train_sampling_strategy" in known:  # transformers 5
        options |= {"train_sampling_strategy": "group_by_length", "warmup_steps": 0.1}
    else:
        options |= {"group_by_length": True, "warmup_ratio": 0.1}
    return TrainingArguments(output_dir=output_dir, **{**options, **overrides})
