"""Texts with one label, and texts with a label for each token: what is for one kind is refused for the other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from badge_peft.workflows.data import TextDataset


def check_kind(rows: TextDataset, reads_tokens: bool, model: str, source: str | Path) -> None:
    """Refuses labels of texts where tokens are labeled, and the reverse.

    Args:
        rows: As read.
        reads_tokens: Whether the model labels tokens.
        model: What it is called in the message.
        source: The data.

    Raises:
        ValueError: they do not belong together.
    """
    column = rows.columns.get("label")
    if reads_tokens and rows.labels and not rows.tagged:
        raise ValueError(
            f"{model} labels tokens, and {source} has one label for each text (column {column!r}): give rows with "
            "tokens and tags, or with text and entities, or leave the labels out (--unlabeled)."
        )
    if not reads_tokens and (rows.tagged or rows.words is not None):
        raise ValueError(
            f"{model} classifies texts, and {source} has a label for each token (column {column!r}): give a model for "
            "token classification or an encoder without a head, or name a column of labels with --label-column."
        )


def check_one_text(pairs: Iterable[str | None] | None) -> None:
    """Refuses pairs of texts where tokens are labeled: the second ones would not be read.

    Raises:
        ValueError: there is one.
    """
    if any(pair is not None for pair in pairs or ()):
        raise ValueError(
            "tokens of one text are labeled, and these are pairs of texts: leave the second ones out, or name the "
            "column of the texts with --text-column."
        )


def check_texts_only(task: str, command: str, ranks: bool = False) -> None:
    """Refuses a token adapter where a command answers whole texts, and one that ranks where it answers text by text.

    Raises:
        ValueError: `task` is that of tokens or, unless the command `ranks`, of queries.
    """
    if task == "ranking" and not ranks:
        raise ValueError(
            f"`badge-peft {command}` answers texts one by one, and this adapter ranks the candidates of a query: use "
            "evaluate, sweep, calibrate, predict, bench, export or serve."
        )
    if task == "tokens":
        raise ValueError(
            f"`badge-peft {command}` is for adapters that classify texts, and this one labels tokens: use train, "
            "evaluate, sweep, calibrate, predict or export."
        )
