"""Rows of tokenized features to padded batches, for passes that have no Trainer around them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from badge_peft.utils.problem import NO_LABEL, Problem

SPECIAL = "special_tokens_mask"
_PADS = {"attention_mask": 0, "token_type_ids": 0, SPECIAL: 1, "labels": NO_LABEL}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards the mode of each module, and what is trained, are as before (PEFT changes the latter
    whenever an adapter is enabled)."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


def tensor_columns(model: nn.Module, dataset: Any, tokens: bool = False) -> list[dict[str, Any]]:
    """The rows of `dataset` with the columns that `model` reads, and `labels`; where each of the `tokens` is answered,
    also which of them need no answer."""
    accepted = {*inspect.signature(model.forward).parameters, "label", "labels", *([SPECIAL] if tokens else [])}
    rows = []
    for row in dataset:
        kept = {k: v for k, v in row.items() if k in accepted and v is not None}
        if "label" in kept:
            kept.setdefault("labels", kept.pop("label"))
            kept.pop("label", None)
        rows.append(kept)
    if "input_ids" not in rows[0]:
        raise ValueError(f"the data set has no input_ids, only {', '.join(dataset[0])}: tokenize it first.")
    return rows


def labeled_rows(
    model: nn.Module, dataset: Any, num_labels: int, problem: Problem, tokens: bool
) -> list[dict[str, Any]]:
    """The rows of `tensor_columns` with labels that can be scored: all rows where none has a label, else those that
    have one. Of `tokens`, which have a label each, all rows, with labels where one has any."""
    rows = tensor_columns(model, dataset, tokens)
    # each [], [K], or [S] of tokens
    labels = {i: torch.as_tensor(row["labels"]) for i, row in enumerate(rows) if "labels" in row}
    if tokens:
        scored = [i for i, label in labels.items() if problem.has_label(label).any()]
    else:
        scored = [i for i, label in labels.items() if problem.has_label(label.view(-1)[:1]).all()]
    if not scored:
        return [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    if tokens:
        for i, row in enumerate(rows):
            if i not in labels or labels[i].shape != (len(row["input_ids"]),):
                found = "none" if i not in labels else str(list(labels[i].shape))
                raise ValueError(
                    f"row {i} has {len(row['input_ids'])} tokens and labels of shape {found}: each token needs one, "
                    f"{NO_LABEL} where it does not count."
                )
        every = torch.cat([*labels.values()])
        every, kept = every[problem.has_label(every)], rows
    else:
        if len(scored) < len(rows):
            count = len(rows) - len(scored)
            warnings.warn(f"{count} of {len(rows)} rows have no label and are left out.", stacklevel=4)
        if len({labels[i].shape for i in scored}) > 1:
            raise ValueError("labels must have the same shape in every row.")
        every, kept = torch.stack([labels[i] for i in scored]), [rows[i] for i in scored]
    problem.scored_labels(every, num_labels, len(every))
    return kept


def pad_features(rows: list[dict[str, Any]], model: nn.Module, tokens: bool = False) -> dict[str, Tensor]:
    """A batch: sequences, and with `tokens` their labels, padded on the right to the longest; an attention mask where
    the rows have none."""
    pad_token = getattr(model.config, "pad_token_id", None)
    longest = max(len(row["input_ids"]) for row in rows)
    if pad_token is None:
        if any(len(row["input_ids"]) != longest for row in rows):
            raise ValueError(
                "rows differ in length, and the model's config has no pad_token_id: set it, or pass a data_collator."
            )
        pad_token = 0
    rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if values[0].dim() == 0 or (name == "labels" and not tokens):
            batch[name] = torch.stack(values)
            continue
        padded = values[0].new_full((len(rows), longest), pad_token if name == "input_ids" else _PADS.get(name, 0))
        for i, value in enumerate(values):
            padded[i, : len(value)] = value
        batch[name] = padded
    return batch
