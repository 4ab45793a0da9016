"""What both engines do with rows: passes of rows of about one length, and answers in the pipeline's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from badge_peft.ranking.report import ExitReport
from badge_peft.serving.requests import Row
from badge_peft.utils.problem import problem_of


def passes(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Places of the rows of each pass: of at most `size` rows, all pairs or none, and sorted by length, so that little
    is padded."""

    def order(place: int) -> tuple[bool, int]:
        text, pair = rows[place]
        return pair is not None, len(text) + len(pair or "")

    for paired in (False, True):
        own = [i for i in sorted(range(len(rows)), key=order) if (rows[i][1] is not None) == paired]
        yield from (own[start : start + size] for start in range(0, len(own), size))


def answered(
    rows: Sequence[Row], size: int, tasks: Sequence[str] | None, answer: Callable[[list[Row]], dict[str, list[Any]]]
) -> list[Any]:
    """The answers of all rows in their order, pass by pass; where there are tasks, a dict from these for each row.

    Args:
        rows: Texts, each with its second text or None.
        size: Rows of a pass at most.
        tasks: Those that are asked for; None: the one adapter.
        answer: Gives the answers of each task to the rows of a pass.
    """
    answers: list[Any] = [None] * len(rows)
    for places in passes(rows, size):
        found = answer([rows[i] for i in places])
        for i, place in enumerate(places):
            answers[place] = {task: own[i] for task, own in found.items()} if tasks else next(iter(found.values()))[i]
    return answers


def columns(rows: Sequence[Row]) -> tuple[list[str], list[str] | None]:
    """The texts, and their pairs where they have some, as a tokenizer takes them; for the rows of one pass."""
    return [text for text, _ in rows], [pair for _, pair in rows if pair is not None] or None


def labeled(
    logits: Any, exit_layer: Any, labels: Sequence[str], problem_type: str, all_scores: bool = False
) -> list[dict[str, Any]]:
    """As transformers' pipeline answers: the best label and its probability; of a regression the value. JSON has no
    NaN and no infinity: None stands in their place.

    Args:
        logits: [n, K].
        exit_layer: [n].
        labels: K names.
        problem_type: As transformers has it.
        all_scores: Whether `scores` has those of all labels, too.
    """
    problem, values = problem_of(problem_type), np.asarray(logits, dtype=np.float32)
    scores: Any
    with np.errstate(over="ignore", invalid="ignore"):
        if not problem.gives_labels:
            scores = values
        elif problem.many_labels:
            scores = 1 / (1 + np.exp(-values))
        else:
            weights = np.exp(values - values.max(-1, keepdims=True))
            scores = weights / weights.sum(-1, keepdims=True)
    answers: list[dict[str, Any]] = [
        {"label": labels[best], "score": _number(row[best]), "exit_layer": int(number)}
        for row, best, number in zip(scores, scores.argmax(-1), exit_layer, strict=True)
    ]
    for answer, row in zip(answers, scores if all_scores else (), strict=all_scores):
        answer["scores"] = {labels[i]: _number(score) for i, score in enumerate(row)}
    return answers


def reranked(found: Sequence[Mapping[str, Any]], report: ExitReport) -> tuple[list[dict[str, Any]], list[int]]:
    """What a reranker says, and the block that each candidate stopped at."""
    answers = [{"index": int(item["corpus_id"]), "score": _number(item["score"])} for item in found]
    return answers, report.exit_layer.tolist()


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
