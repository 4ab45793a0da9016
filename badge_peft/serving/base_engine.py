"""What both engines do: rows in passes of about one length, and answers in the pipeline's form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import policy_class
from badge_peft.serving.requests import RequestError, Row
from badge_peft.serving.settings import MAIN
from badge_peft.utils.problem import problem_of
from badge_peft.utils.texts import check_second_text

NEVER = EarlyExitConfig(policy="never")
Array = np.ndarray
Check = Callable[[str, EarlyExitConfig], None]  # raises a ValueError where a setting does not suit a task


class BaseEngine(ABC):
    """Answers the rows of many requests together. It knows models, and no server."""

    tasks: list[str]  # their names; empty for one adapter
    configs: dict[str, EarlyExitConfig]  # for each task (or `default`) the adapter's own setting
    exits: dict[str, list[int]]
    problems: dict[str, str]  # problem types
    labels: dict[str, list[str]]
    reads_pairs: bool  # whether it was trained on pairs of texts
    batch_size: int  # rows of a pass
    _ranker: Any = None  # where the model has one output, and ranks pairs
    _ranks_not: str

    @property
    def ranks(self) -> bool:
        return self._ranker is not None

    @abstractmethod
    def checks(self) -> Check:
        """What refuses settings that do not suit the adapter; another process can have it."""

    @abstractmethod
    def _run(
        self, rows: Sequence[Row], configs: Mapping[str, EarlyExitConfig], tasks: Sequence[str]
    ) -> dict[str, tuple[Array, Array]]:
        """Of each task logits [n, K] and exits [n] for the rows of one pass."""

    @abstractmethod
    def _bounded(self, task: str, config: EarlyExitConfig, max_exit: int) -> EarlyExitConfig:
        """`config` with the bound of a request; a ValueError where the model does not have it."""

    @abstractmethod
    def _rank(self, query: str, texts: list[str], top_k: int | None, config: EarlyExitConfig) -> Any:
        """What a reranker says, with its report; a ValueError where it cannot."""

    def unwatched(self, shadow_share: float) -> dict[str, str]:
        """For tasks whose traffic is not watched for drift, whatever the setting, the reason."""
        why = "the candidates of /rerank are not run twice." if self.ranks else None
        why = why or (None if shadow_share else "no rows are run at full depth as well: give a --shadow-share.")
        return dict.fromkeys(self.configs, why) if why else {}

    def predict(
        self,
        rows: Sequence[Row],
        configs: Mapping[str, EarlyExitConfig],
        tasks: Sequence[str] | None = None,
        max_exit: int | None = None,
        all_scores: bool = False,
    ) -> list[Any]:
        """What the pipeline answers to each row: a dict, or with tasks a dict of dicts; `max_exit` is a block that no
        row goes past, and with `all_scores` each says those of all labels. A RequestError where that cannot be."""
        asked = tasks or (MAIN,)
        try:
            for _, pair in rows:
                check_second_text(self.reads_pairs, pair is not None)
            chosen = dict(configs)
            if max_exit is not None:
                chosen |= {task: self._bounded(task, configs[task], max_exit) for task in asked}
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        if any(policy_class(chosen[task]).by_group for task in asked):
            raise RequestError(
                400, "this service ranks the candidates of a query, which the rows of /predict are not: use /rerank."
            )
        answers: list[Any] = [None] * len(rows)
        for places in passes(rows, self.batch_size):
            found = self._run([rows[i] for i in places], chosen, asked)
            said = {task: labeled(*found[task], self.labels[task], self.problems[task], all_scores) for task in asked}
            for i, place in enumerate(places):
                answers[place] = {task: own[i] for task, own in said.items()} if tasks else said[MAIN][i]
        return answers

    def rerank(
        self, query: str, texts: Sequence[str], top_k: int | None, config: EarlyExitConfig
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """`index` and `score`, best first, at `config`, and for each text the block that it stopped at. Without a
        `top_k` as many as were calibrated for, else all. A RequestError for what cannot be ranked."""
        if not self.ranks:
            raise RequestError(400, f"this service does not rank: {self._ranks_not}. Use /predict.")
        try:
            found, report = self._rank(query, list(texts), top_k, config)
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        answers = [{"index": int(item["corpus_id"]), "score": _number(item["score"])} for item in found]
        return answers, report.exit_layer.tolist()

    def shadow(self, task: str, rows: Sequence[Row], config: EarlyExitConfig) -> dict[str, Any]:
        """Answers the rows of one pass early and at full depth: what `ExitMonitor.observe` takes, as lists."""
        (logits, exits), (full, _) = (
            self._run(rows, {**self.configs, task: own}, [task])[task] for own in (config, NEVER)
        )
        said = {"exit_layer": exits.tolist(), "logits": logits.tolist(), "full_logits": full.tolist()}
        return {"config": config.to_dict(), **said}


def passes(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Places of the rows of each pass: of at most `size` rows, all pairs or none, and sorted by length, so that little
    is padded."""
    order = sorted(range(len(rows)), key=lambda i: sum(len(text or "") for text in rows[i]))
    for paired in (False, True):
        own = [i for i in order if (rows[i][1] is not None) == paired]
        yield from (own[start : start + size] for start in range(0, len(own), size))


def columns(rows: Sequence[Row]) -> tuple[list[str], list[str] | None]:
    """The texts, and their pairs where they have some, as a tokenizer takes them; for the rows of one pass."""
    return [text for text, _ in rows], [pair for _, pair in rows if pair is not None] or None


def labeled(
    logits: Any, exit_layer: Any, labels: Sequence[str], problem_type: str, all_scores: bool = False
) -> list[dict[str, Any]]:
    """As transformers' pipeline answers [n, K] logits: the best label and its probability; of a regression the value.
    JSON has no NaN and no infinity: None stands in their place."""
    problem = problem_of(problem_type)
    scores: Array = np.asarray(logits, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if problem.gives_labels and problem.many_labels:
            scores = 1 / (1 + np.exp(-scores))
        elif problem.gives_labels:
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            scores = weights / weights.sum(-1, keepdims=True)
    answers = []
    for row, best, number in zip(scores, scores.argmax(-1), exit_layer, strict=True):
        answer: dict[str, Any] = {"label": labels[best], "score": _number(row[best]), "exit_layer": int(number)}
        if all_scores:
            answer["scores"] = {label: _number(score) for label, score in zip(labels, row, strict=True)}
        answers.append(answer)
    return answers


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
