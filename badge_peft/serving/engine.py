"""`Engine`: answers in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward, validate_policy
from badge_peft.model import get_badge_model
from badge_peft.pipelines import MultiTaskPipeline, pipeline
from badge_peft.ranking import EarlyExitReranker
from badge_peft.serving.base_engine import Array, BaseEngine, Check, columns
from badge_peft.serving.requests import Row
from badge_peft.serving.settings import MAIN, check_texts
from badge_peft.tuner.architectures import max_positions
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils.logs import quiet
from badge_peft.utils.texts import longest_text


class Engine(BaseEngine):
    """A loaded adapter, or a bundle of many: a folder or repository, or a dict from tasks to such."""

    _ranks_not = "its model has several outputs"

    def __init__(
        self, adapter: Any, base_model: str | None = None, threads: int | None = None, batch_size: int = 32
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.batch_size = batch_size
        with quiet():
            made = pipeline(model=adapter, model_kwargs={"base_model": base_model} if base_model else None)
        self.tasks = list(made.tasks) if isinstance(made, MultiTaskPipeline) else []
        self.model, self.tokenizer, self.badge = made.model, made.tokenizer, get_badge_model(made.model)
        self._longest = longest_text(self.tokenizer, max_positions(self.badge.model))
        names: list[str | None] = [*self.tasks] or [None]
        self._adapters = {name or MAIN: self.badge.config_of(name) for name in names}
        check_texts([task for task, own in self._adapters.items() if own.reads_tokens])
        self.configs = {name or MAIN: self.badge.get_early_exit_config(name) for name in names}
        self.exits = {name or MAIN: self.badge.exit_layers(name) for name in names}
        self.labels = {name or MAIN: self.badge.label_names(name) for name in names}
        self.problems = {task: own.resolved_problem_type for task, own in self._adapters.items()}
        self.reads_pairs = any(own.reads_pairs for own in self._adapters.values())
        if not self.tasks and self._adapters[MAIN].resolved_labels == 1:
            self._ranker = EarlyExitReranker(self.model, self.tokenizer, batch_size=batch_size)

    def checks(self) -> Check:
        return partial(_check, self._adapters, self.badge.num_blocks)

    def _run(
        self, rows: Sequence[Row], configs: Mapping[str, EarlyExitConfig], tasks: Sequence[str]
    ) -> dict[str, tuple[Array, Array]]:
        cut = {"truncation": True, "max_length": self._longest}
        encoded: Any = self.tokenizer(*columns(rows), padding=True, return_tensors="pt", **cut).to(self.model.device)
        if self.tasks:
            chosen = {task: configs[task] for task in tasks}
            found: Any = early_exit_forward(self.model, tasks=list(tasks), early_exit_config=chosen, **encoded)
        else:
            found = {MAIN: early_exit_forward(self.model, early_exit_config=configs[MAIN], **encoded)}
        return {task: (own.logits.float().cpu().numpy(), own.exit_layer.cpu().numpy()) for task, own in found.items()}

    def _bounded(self, task: str, config: EarlyExitConfig, max_exit: int) -> EarlyExitConfig:
        bounded = EarlyExitConfig.of(config, max_exit=max_exit)
        self.checks()(task, bounded)
        return config if config.max_exit is not None and config.max_exit <= max_exit else bounded

    def _rank(self, query: str, texts: list[str], top_k: int | None, config: EarlyExitConfig) -> Any:
        early = config.policy == "top_k"
        top_k = config.resolved_top_k if top_k is None and early else top_k
        how: dict[str, Any] = {"full_depth": not early, "early_exit_config": config, "return_report": True}
        return self._ranker.rank(query, texts, top_k=top_k, **how)


def _check(adapters: dict[str, BadgeConfig], num_blocks: int, task: str, config: EarlyExitConfig) -> None:
    validate_policy(config, adapters[task], num_blocks)
