"""`OnnxEngine`: answers by a file that `export_onnx` or `export_tasks_onnx` wrote, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.export.folder import LARGEST_PATIENCE, holds_tasks
from badge_peft.export.ranking import OnnxReranker
from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxTasksModel
from badge_peft.serving.base_engine import NEVER, Array, BaseEngine, Check, columns
from badge_peft.serving.requests import Row
from badge_peft.serving.settings import MAIN, check_texts

_FAR = 1e30  # beyond every score, in float32 and times ln K, too
_MOVED = ("threshold", "patience", "calibration")


@dataclass(frozen=True)
class FixedRule:
    """The rule in a file, of which a call moves the threshold and the patience; `thresholds` is how many the file
    takes, 0 for one number."""

    config: EarlyExitConfig
    num_labels: int
    problem_type: str
    num_blocks: int
    thresholds: int

    @classmethod
    def of(cls, facts: Mapping[str, Any], num_blocks: int) -> FixedRule:
        """From what `early_exit.json` says of a task."""
        config, tau = EarlyExitConfig.of(facts["early_exit"]), facts["threshold"]
        return cls(
            config, facts["num_labels"], facts["problem_type"], num_blocks, len(tau) if isinstance(tau, list) else 0
        )

    def inputs(self, config: EarlyExitConfig) -> tuple[Any, int | None]:
        """Threshold and patience of a call at `config`, None where the rule does not read it; a ValueError where the
        file cannot answer at this setting."""
        own = build_policy(self.config)
        compares = own.uses_threshold(self.problem_type)
        if config.policy == "never" and self.config.policy != "never":
            return self._full_depth(own, compares)
        names = [f.name for f in fields(config) if f.name not in _MOVED]
        other = [name for name in names if getattr(config, name) != getattr(self.config, name)]
        if other:
            raise ValueError(
                f"{other[0]}={getattr(config, other[0])!r} is not allowed: it is fixed in the file as "
                f"{getattr(self.config, other[0])!r}, and a call changes threshold and patience (or goes to full "
                "depth, policy='never'). Export the adapter with the other rule, or serve it without --onnx."
            )
        wanted = build_policy(config).resolve(self.num_labels, self.problem_type)
        given = len(wanted.threshold) if isinstance(wanted.threshold, list) else 0
        if compares and given not in (0, self.thresholds):
            number = f"{self.thresholds}, one for each exit" if self.thresholds else "one number"
            raise ValueError(f"threshold={wanted.threshold} is not allowed: the file takes {number}.")
        return wanted.threshold if compares else None, wanted.patience if own.counts_exits else None

    def _full_depth(self, own: Any, compares: bool) -> tuple[Any, int | None]:
        """Numbers by which no row stops before the last block."""
        capped = own.max_exit is not None and own.max_exit < self.num_blocks
        if capped or own.by_group or not (own.counts_exits or compares):
            raise ValueError(
                f"policy='never' is not allowed: the file, of policy={self.config.policy!r}, cannot be sent to full "
                "depth. Export the adapter with another rule, or serve it without --onnx."
            )
        if own.counts_exits:
            return None, LARGEST_PATIENCE
        return _FAR if own.stops_above else -_FAR, None


class OnnxEngine(BaseEngine):
    """A loaded file. All of its tasks run, whichever are asked for."""

    _ranks_not = "the rule in its file is not top_k"

    def __init__(self, folder: str, threads: int | None = None, batch_size: int = 32) -> None:
        self.batch_size = batch_size
        kind = OnnxTasksModel if holds_tasks(folder) else OnnxEarlyExitModel
        self.session: Any = kind.from_pretrained(folder, threads=threads)
        check_texts([MAIN] if self.session.reads_tokens else [])
        facts = self.session.config
        of_tasks: Mapping[str, Any] = facts.get("tasks") or {MAIN: facts}
        self.tasks = list(facts.get("tasks") or [])
        self.rules = {task: FixedRule.of(own, facts["num_blocks"]) for task, own in of_tasks.items()}
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


def _check(rules: Mapping[str, FixedRule], task: str, config: EarlyExitConfig) -> None:
    rules[task].inputs(config)
