"""How the answers of an exported file differ from those of the PyTorch model that it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.evaluation.metrics import METRICS, predictions
from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxOutput
from badge_peft.export.segments import OTHER, example_inputs
from badge_peft.model import BadgeModel


@dataclass
class Changes:
    """A file against its PyTorch model on the same rows.

    Args:
        rows: How many.
        same_answer: Share of rows with the same predicted label (regression: mean absolute difference of the values).
        same_exit: Share of rows that stop at the same block.
        mean_exit: Mean number of the block that answered, in the file.
        mean_exit_before: In PyTorch.
        score: Accuracy (regression: Pearson correlation) of the file, where there are labels.
        score_before: Of PyTorch.
    """

    rows: int
    same_answer: float
    same_exit: float
    mean_exit: float
    mean_exit_before: float
    score: float | None = None
    score_before: float | None = None


def compare(
    badge: BadgeModel, session: OnnxEarlyExitModel, config: EarlyExitConfig, examples: Any, batch_size: int = 1
) -> Changes:
    """Both models on `examples`, tokenised rows with or without labels.

    Raises:
        ValueError: there are no examples.
    """
    if not len(examples):
        raise ValueError("there are no examples: pass at least one tokenised row, or None.")
    rows = tensor_columns(badge.model, examples)
    labels = [row.pop("labels") for row in rows] if all("labels" in row for row in rows) else None
    for row in rows:
        row.pop("labels", None)
    before, after, exits_before, exits = [], [], [], []
    for start in range(0, len(rows), batch_size):
        batch = pad_features(rows[start : start + batch_size], badge.model)
        expected, found = _answers(badge, session, config, batch)
        before.append(expected.logits)
        exits_before.append(expected.exit_layer)
        after.append(found.logits)
        exits.append(found.exit_layer)
    kind = session.config["problem_type"]
    old, new = (predictions(torch.from_numpy(np.concatenate(x)), kind) for x in (before, after))
    old, new = np.asarray(old), np.asarray(new)
    same = np.abs(old - new).mean() if kind == "regression" else (old == new).reshape(len(rows), -1).all(axis=1).mean()
    where_before, where = np.concatenate(exits_before), np.concatenate(exits)
    changes = Changes(
        len(rows), float(same), float((where == where_before).mean()), float(where.mean()), float(where_before.mean())
    )
    if labels is not None:
        metric = METRICS["pearson" if kind == "regression" else "accuracy"]
        changes.score, changes.score_before = (metric(x, np.asarray(labels)) for x in (new, old))
    return changes


def _answers(
    badge: BadgeModel, session: OnnxEarlyExitModel, config: EarlyExitConfig, batch: dict[str, Tensor]
) -> tuple[OnnxOutput, OnnxOutput]:
    """PyTorch's and the file's."""
    device = next(badge.model.parameters()).device
    output = early_exit_forward(badge, early_exit_config=config, **{k: v.to(device) for k, v in batch.items()})
    assert output.logits is not None and output.exit_layer is not None
    fields: dict[str, Any] = {name: batch[name].numpy() for name in session.config["inputs"] if name in batch}
    return OnnxOutput(output.logits.cpu().numpy(), output.exit_layer.cpu().numpy()), session(**fields)


def largest_difference(badge: BadgeModel, session: OnnxEarlyExitModel, config: EarlyExitConfig) -> float:
    """Of the logits on random rows, one by one and together; rows that stop elsewhere (ties) are left out.

    NaN where no row stops at the same block.
    """
    batch = example_inputs(session.config["inputs"], OTHER, int(badge.model.config.vocab_size))
    alone = {name: value[:1] for name, value in batch.items()}
    differences = []
    for inputs in (batch, alone):
        expected, found = _answers(badge, session, config, inputs)
        same = expected.exit_layer == found.exit_layer
        differences.append(np.abs(expected.logits - found.logits)[same])
    values = np.concatenate(differences)
    return float(values.max()) if values.size else float("nan")
