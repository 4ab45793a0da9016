"""What one row's logits say in words: a label with its probability, several labels, or a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def spoken(logits: np.ndarray, names: Sequence[str], problem_type: str) -> dict[str, Any]:
    """The answer as JSON-able values.

    Args:
        logits: [K] float.
        names: Of the labels.
        problem_type: As transformers has it.

    Returns:
        `label` and `confidence` (the label's probability); `labels` and the confidence of the least sure decision,
        where a row may have several; `value`, a number or a list of them, for regression.
    """
    if problem_type == "regression":
        values = [_number(float(value)) for value in logits]
        return {"value": values[0] if len(values) == 1 else values}
    with np.errstate(over="ignore", invalid="ignore"):
        if problem_type == "multi_label_classification":
            sure = (1 / (1 + np.exp(-np.abs(logits)))).min()  # the larger of p and 1 - p
            chosen = [name for name, value in zip(names, logits, strict=True) if value > 0]
            return {"labels": chosen, "confidence": _number(float(sure))}
        weights = np.exp(logits - logits.max())
        best = int(logits.argmax())
        return {"label": names[best], "confidence": _number(float(weights[best] / weights.sum()))}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if math.isfinite(value) else None
