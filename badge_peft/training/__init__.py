"""Training multi-exit models with transformers' Trainer."""

from __future__ import annotations

from badge_peft.training.arguments import MultiExitTrainingArguments, multi_exit_arguments
from badge_peft.training.caching import CachedStates, cache_states
from badge_peft.training.choose import ExitForm, choose_exits
from badge_peft.training.objectives import OBJECTIVES, Objective
from badge_peft.training.parameters import make_optimizer, parameter_groups
from badge_peft.training.ranking import QueryCollator, RankingDistillation, query_batches
from badge_peft.training.trainer import MultiExitTrainer

__all__ = [
    "OBJECTIVES",
    "CachedStates",
    "ExitForm",
    "MultiExitTrainer",
    "MultiExitTrainingArguments",
    "Objective",
    "QueryCollator",
    "RankingDistillation",
    "cache_states",
    "choose_exits",
    "make_optimizer",
    "multi_exit_arguments",
    "parameter_groups",
    "query_batches",
]
