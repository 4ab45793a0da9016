"""`Engine`: answers the rows of many requests together. It knows models, and no server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.dispatch import check_fits
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import policy_class
from badge_peft.model import get_badge_model
from badge_peft.pipelines import MultiTaskPipeline, pipeline
from badge_peft.ranking import EarlyExitReranker
from badge_peft.serving.answers import answered, columns, labeled, reranked
from badge_peft.serving.requests import RequestError, Row, check_pairs
from badge_peft.tuner.architectures import max_positions
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils.logs import quiet
from badge_peft.utils.texts import longest_text

MAIN = "default"  # what the one adapter of a service without tasks is called
BY_QUERY = "this service ranks the candidates of a query, which the rows of /predict are not: use /rerank."


def check_texts(tagging: Sequence[str]) -> None:
    """Refuses tasks whose answers are tags of tokens.

    Raises:
        ValueError: there is one.
    """
    if tagging:
        who = "the adapter" if list(tagging) == [MAIN] else ", ".join(tagging)
        raise ValueError(
            f"{who}: the answers are tags of tokens, and a service answers whole texts. Leave it out, and tag with "
            "badge-peft predict or badge_peft.pipeline."
        )


@dataclass(frozen=True)
class SettingCheck:
    """Refuses settings that do not suit an adapter.

    Args:
        adapters: For each task the config of its adapter.
        num_blocks: M.
    """

    adapters: dict[str, BadgeConfig]
    num_blocks: int

    def __call__(self, task: str, config: EarlyExitConfig) -> None:
        """Raises a ValueError where `config` does not suit `task`."""
        check_fits(config, self.adapters[task], self.num_blocks)


class Engine:
    """A loaded adapter, or a bundle of many.

    Args:
        adapter: A folder or repository, or a dict from tasks to such.
        base_model: As for `load_pretrained`.
        threads: Of torch; None leaves it as it is.
        batch_size: Rows per pass.

    Attributes:
        tasks: Names of the tasks; empty for one adapter.
        configs: For each task (or `default`) the adapter's own setting.
        exits: For each its exits.
        problems: For each its problem type.
        labels: For each the names of its labels.
        ranks: Whether the model has one output, and ranks pairs.
    """

    def __init__(
        self, adapter: Any, base_model: str | None = None, threads: int | None = None, batch_size: int = 32
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.batch_size = batch_size
        with quiet():
            made = pipeline(model=adapter, model_kwargs={"base_model": base_model} if base_model else None)
        self.tasks: list[str] = list(made.tasks) if isinstance(made, MultiTaskPipeline) else []
        self.model, self.tokenizer, self.badge = made.model, made.tokenizer, get_badge_model(made.model)
        self._longest = longest_text(self.tokenizer, max_positions(self.badge.model))
        names: list[str | None] = [*self.tasks] or [None]
        check_texts([name or MAIN for name in names if self.badge.config_of(name).reads_tokens])
        self.configs = {name or MAIN: self.badge.get_early_exit_config(name) for name in names}
        self.exits = {name or MAIN: self.badge.exit_layers(name) for name in names}
        self.problems = {name or MAIN: self.badge.config_of(name).resolved_problem_type for name in names}
        self.labels = {name or MAIN: self.badge.label_names(name) for name in names}
        self._reads_pairs = any(self.badge.config_of(name).reads_pairs for name in names)
        self.ranks = not self.tasks and self.badge.config_of().resolved_labels == 1
        self._reranker = EarlyExitReranker(self.model, self.tokenizer, batch_size=batch_size) if self.ranks else None

    def checks(self) -> SettingCheck:
        """What refuses settings that do not suit the adapter; another process can have it."""
        names: list[str | None] = [*self.tasks] or [None]
        adapters = {name or MAIN: self.badge.config_of(name) for name in names}
        return SettingCheck(adapters, self.badge.num_blocks)

    def unwatched(self) -> dict[str, str]:
        """For tasks that cannot be answered at full depth as well, the reason."""
        return {}

    def predict(
        self,
        rows: Sequence[Row],
        configs: dict[str, EarlyExitConfig],
        tasks: tuple[str, ...] | None = None,
        max_exit: int | None = None,
        all_scores: bool = False,
    ) -> list[Any]:
        """What the pipeline answers to each row: a dict, or with tasks a dict of dicts.

        Args:
            rows: Texts, each with its second text or None.
            configs: For each task (or `default`) the setting to answer at.
            tasks: Some of `tasks`; None where there are none.
            max_exit: No row goes past this block.
            all_scores: As for `labeled`.

        Raises:
            RequestError: 400 for a `max_exit` at which nothing could answer, or that the model does not have; where
                the setting compares the candidates of a query: the rows here are of many requests; and for one text
                where the adapter was trained on pairs.
        """
        check_pairs(self._reads_pairs, rows)
        asked = tasks or (MAIN,)
        chosen = {task: self._bounded(task, configs[task], max_exit) for task in asked}
        if any(policy_class(config).by_group for config in chosen.values()):
            raise RequestError(400, BY_QUERY)

        def answer(part: list[Row]) -> dict[str, list[Any]]:
            encoded = self._encode(part)
            if tasks:
                outputs: Any = early_exit_forward(self.model, tasks=list(tasks), early_exit_config=chosen, **encoded)
            else:
                outputs = {MAIN: early_exit_forward(self.model, early_exit_config=chosen[MAIN], **encoded)}
            return {
                task: labeled(
                    own.logits.float().cpu(), own.exit_layer, self.labels[task], self.problems[task], all_scores
                )
                for task, own in outputs.items()
            }

        return answered(rows, self.batch_size, tasks, answer)

    def _encode(self, rows: Sequence[Row]) -> Any:
        """The rows of one pass as a padded batch."""
        cut = {"truncation": True, "max_length": self._longest}
        encoded = self.tokenizer(*columns(rows), padding=True, return_tensors="pt", **cut)
        return encoded.to(self.model.device)

    def rerank(
        self, query: str, texts: Sequence[str], top_k: int | None, config: EarlyExitConfig
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """`index` and `score`, best first, as `config` says, of another policy than `top_k` at full depth; and for
        each text the block that it stopped at. Without a `top_k` as many as `config` was calibrated for, else all.

        Raises:
            RequestError: 400 where the model does not rank, or the query is empty.
        """
        if self._reranker is None:
            raise RequestError(400, "this service does not rank: its model has several outputs. Use /predict.")
        ranks_early = config.policy == "top_k"
        how: dict[str, Any] = {"full_depth": not ranks_early, "early_exit_config": config}
        top_k = config.resolved_top_k if top_k is None and ranks_early else top_k
        try:
            ranked = self._reranker.rank(query, list(texts), top_k=top_k, return_report=True, **how)
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        return reranked(*ranked)

    def shadow(self, task: str, rows: Sequence[Row], config: EarlyExitConfig) -> dict[str, Any] | None:
        """Answers the rows of one pass early and at full depth: what `ExitMonitor.observe` takes, as lists."""
        encoded = self._encode(rows)
        names: Any = {} if task == MAIN else {"adapter_names": [task] * len(rows)}
        early = early_exit_forward(self.model, early_exit_config=config, **encoded, **names)
        full = early_exit_forward(self.model, policy="never", **encoded, **names)
        assert early.logits is not None and full.logits is not None and early.exit_layer is not None
        return {
            "config": config.to_dict(),
            "exit_layer": early.exit_layer.tolist(),
            "logits": np.asarray(early.logits.float().cpu()).tolist(),
            "full_logits": np.asarray(full.logits.float().cpu()).tolist(),
        }

    def _bounded(self, task: str, config: EarlyExitConfig, max_exit: int | None) -> EarlyExitConfig:
        if max_exit is None:
            return config
        try:
            bounded = EarlyExitConfig.of(config, max_exit=max_exit)
            self.checks()(task, bounded)
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        return config if config.max_exit is not None and config.max_exit <= max_exit else bounded
