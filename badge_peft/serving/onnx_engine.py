"""`OnnxEngine`: answers by a file that `export_onnx` or `export_tasks_onnx` wrote, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.export.folder import holds_tasks
from badge_peft.export.ranking import OnnxReranker
from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxTasksModel
from badge_peft.serving.base_engine import NEVER, Array, BaseEngine, Check, columns
from badge_peft.serving.fixed_policy import FixedPolicy
from badge_peft.serving.requests import Row
from badge_peft.serving.settings import MAIN, check_texts


class OnnxEngine(BaseEngine):
    """A loaded file. All of its tasks run, whichever are asked for."""

    _ranks_not = "the policy in its file is not top_k"

    def __init__(self, folder: str, threads: int | None = None, batch_size: int = 32) -> None:
        self.batch_size = batch_size
        kind = OnnxTasksModel if holds_tasks(folder) else OnnxEarlyExitModel
        self.session: Any = kind.from_pretrained(folder, threads=threads)
        check_texts([MAIN] if self.session.reads_tokens else [])
        facts = self.session.config
        of_tasks: Mapping[str, Any] = facts.get("tasks") or {MAIN: facts}
        self.tasks = list(facts.get("tasks") or [])
        self.rules = {task: FixedPolicy.of(own, facts["num_blocks"]) for task, own in of_tasks.items()}
        self.configs = {task: rule.config for task, rule in self.rules.items()}
        self.problems = {task: rule.problem_type for task, rule in self.rules.items()}
        self.labels = {
            task: own["labels"] or [f"LABEL_{i}" for i in range(own["num_labels"])] for task, own in of_tasks.items()
        }
        self.exits = {task: list(own["exit_layers"]) for task, own in of_tasks.items()}
        self.reads_pairs = self.session.reads_pairs
        self._ranker = OnnxReranker(self.session) if "top_k" in facts else None
        _ = self.session.tokenizer  # what is missing is said now

    def checks(self) -> Check:
        return partial(_check, self.rules)

    def unwatched(self, shadow_share: float) -> dict[str, str]:
        found = super().unwatched(shadow_share)
        for task, rule in self.rules.items():
            try:
                rule.inputs(NEVER)
            except ValueError as error:
                found.setdefault(task, str(error))
        return found

    def _run(
        self, rows: Sequence[Row], configs: Mapping[str, EarlyExitConfig], tasks: Sequence[str]
    ) -> dict[str, tuple[Array, Array]]:
        if self.session.config["int8"] and len(rows) > 1:
            # one by one: the scale of int8's activations is that of the call, and a row would be answered by others
            alone = [self._run([row], configs, tasks) for row in rows]
            joined = {
                task: [np.concatenate(part) for part in zip(*(own[task] for own in alone), strict=True)]
                for task in tasks
            }
            return {task: (logits, exits) for task, (logits, exits) in joined.items()}
        given = {task: rule.inputs(configs[task]) for task, rule in self.rules.items()}
        names = ("threshold", "patience")
        if self.tasks:
            how: Any = {name: {task: own[i] for task, own in given.items()} for i, name in enumerate(names)}
        else:
            how = dict(zip(names, given[MAIN], strict=True))
        found = self.session(**self.session.tokenize(*columns(rows)), **how)
        found = found if self.tasks else {MAIN: found}
        return {task: (own.logits, own.exit_layer) for task, own in found.items()}

    def _bounded(self, task: str, config: EarlyExitConfig, max_exit: int) -> EarlyExitConfig:
        raise ValueError("max_exit is fixed in an ONNX file: leave it out, or serve without --onnx.")

    def _rank(self, query: str, texts: list[str], top_k: int | None, config: EarlyExitConfig) -> Any:
        threshold, _ = self.rules[MAIN].inputs(config)
        return self._ranker.rank(query, texts, top_k, threshold=threshold, return_report=True)


def _check(rules: Mapping[str, FixedPolicy], task: str, config: EarlyExitConfig) -> None:
    rules[task].inputs(config)
