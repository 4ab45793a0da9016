"""`OnnxEngine`: as `Engine`, on a file that `export_onnx` or `export_tasks_onnx` wrote, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.export.folder import LARGEST_PATIENCE, holds_tasks
from badge_peft.export.ranking import OnnxReranker
from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxOutput
from badge_peft.export.tasks import OnnxTasksModel
from badge_peft.serving.answers import answered, columns, labeled, reranked
from badge_peft.serving.engine import BY_QUERY, MAIN, check_texts
from badge_peft.serving.requests import RequestError, Row, check_pairs

_FAR = 1e30  # beyond every score, in float32 and times ln K, too
_MOVED = ("threshold", "patience", "calibration")


@dataclass(frozen=True)
class FixedRule:
    """The rule in a file, of which a call moves the threshold and the patience.

    Args:
        config: The rule.
        num_labels: K.
        problem_type: As transformers has it.
        num_blocks: M.
        thresholds: How many the file takes; 0: one number.
    """

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
        """Threshold and patience of a call at `config`; None where the rule does not read it.

        Raises:
            ValueError: the file cannot answer at this setting.
        """
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


@dataclass(frozen=True)
class FileCheck:
    """Refuses settings at which a file cannot answer.

    Args:
        rules: By task.
    """

    rules: dict[str, FixedRule]

    def __call__(self, task: str, config: EarlyExitConfig) -> None:
        """Raises a ValueError where it cannot."""
        self.rules[task].inputs(config)


class OnnxEngine:
    """A loaded file. Arguments and attributes are those of `Engine`.

    Args:
        folder: That the export wrote.
        threads: Of ONNX Runtime.
        batch_size: Rows per call.
    """

    def __init__(self, folder: str, threads: int | None = None, batch_size: int = 32) -> None:
        self.batch_size = batch_size
        kind = OnnxTasksModel if holds_tasks(folder) else OnnxEarlyExitModel
        self.session: Any = kind.from_pretrained(folder, threads=threads)
        check_texts([MAIN] if self.session.reads_tokens else [])
        facts = self.session.config
        of_tasks: Mapping[str, Any] = facts.get("tasks") or {MAIN: facts}
        self.tasks = list(facts.get("tasks") or [])
        self.configs = {task: EarlyExitConfig.of(own["early_exit"]) for task, own in of_tasks.items()}
        self.problems = {task: own["problem_type"] for task, own in of_tasks.items()}
        self.labels = {
            task: own["labels"] or [f"LABEL_{i}" for i in range(own["num_labels"])] for task, own in of_tasks.items()
        }
        self.rules = {task: FixedRule.of(own, facts["num_blocks"]) for task, own in of_tasks.items()}
        self.exits = {task: list(own["exit_layers"]) for task, own in of_tasks.items()}
        self._reranker = OnnxReranker(self.session) if "top_k" in facts else None
        self.ranks = self._reranker is not None
        _ = self.session.tokenizer  # what is missing is said now

    def checks(self) -> FileCheck:
        """What refuses settings at which the file cannot answer; another process can have it."""
        return FileCheck(dict(self.rules))

    def unwatched(self) -> dict[str, str]:
        """As `Engine.unwatched`."""
        found = {}
        for task, rule in self.rules.items():
            try:
                rule.inputs(EarlyExitConfig(policy="never"))
            except ValueError as error:
                found[task] = str(error)
        return found

    def predict(
        self,
        rows: Sequence[Row],
        configs: dict[str, EarlyExitConfig],
        tasks: tuple[str, ...] | None = None,
        max_exit: int | None = None,
        all_scores: bool = False,
    ) -> list[Any]:
        """As `Engine.predict`. All tasks of the file run, whichever are asked for.

        Raises:
            RequestError: 400 for a `max_exit`, which is fixed in a file, where the file ranks, and for one text where
                it was trained on pairs.
        """
        if max_exit is not None:
            raise RequestError(400, "max_exit is fixed in an ONNX file: leave it out, or serve without --onnx.")
        if self.ranks:
            raise RequestError(400, BY_QUERY)
        check_pairs(self.session.reads_pairs, rows)

        def answer(part: list[Row]) -> dict[str, list[Any]]:
            outputs = self._run(part, configs)
            return {
                task: labeled(own.logits, own.exit_layer, self.labels[task], self.problems[task], all_scores)
                for task, own in outputs.items()
                if task in (tasks or (MAIN,))
            }

        return answered(rows, self.batch_size, tasks, answer)

    def rerank(
        self, query: str, texts: Sequence[str], top_k: int | None, config: EarlyExitConfig
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """As `Engine.rerank`.

        Raises:
            RequestError: 400 where the rule in the file does not rank, or the query is empty.
        """
        if self._reranker is None:
            raise RequestError(400, "this service does not rank: the rule in its file is not top_k. Use /predict.")
        threshold, _ = self.rules[MAIN].inputs(config)
        try:
            ranked = self._reranker.rank(query, list(texts), top_k, threshold=threshold, return_report=True)
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        return reranked(*ranked)

    def shadow(self, task: str, rows: Sequence[Row], config: EarlyExitConfig) -> dict[str, Any] | None:
        """As `Engine.shadow`; None where the file cannot be sent to full depth."""
        if task in self.unwatched():
            return None
        never = EarlyExitConfig(policy="never")
        early, full = (self._run(rows, {**self.configs, task: c})[task] for c in (config, never))
        return {
            "config": config.to_dict(),
            "exit_layer": early.exit_layer.tolist(),
            "logits": early.logits.tolist(),
            "full_logits": full.logits.tolist(),
        }

    def _run(self, rows: Sequence[Row], configs: Mapping[str, EarlyExitConfig]) -> dict[str, OnnxOutput]:
        """The answers of all tasks to the rows of a pass; in int8 row by row: there the scale of the activations is
        that of the whole call, and a row would be answered by what others happen to be in it."""
        if self.session.config["int8"] and len(rows) > 1:
            alone = [self._run([row], configs) for row in rows]
            return {
                task: OnnxOutput(
                    np.concatenate([own[task].logits for own in alone]),
                    np.concatenate([own[task].exit_layer for own in alone]),
                )
                for task in alone[0]
            }
        encoded = self.session.tokenize(*columns(rows))
        given = {task: self.rules[task].inputs(configs[task]) for task in self.rules}
        if not self.tasks:
            threshold, patience = given[MAIN]
            return {MAIN: self.session(**encoded, threshold=threshold, patience=patience)}
        thresholds, counts = ({task: numbers[i] for task, numbers in given.items()} for i in (0, 1))
        return self.session(**encoded, threshold=thresholds, patience=counts)
