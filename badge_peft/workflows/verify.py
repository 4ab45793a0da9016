"""Whether full depth still answers as the checkpoint does, bit for bit: checked, not assumed."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.model import get_badge_model
from badge_peft.utils.logs import quiet

ROWS = 512  # of the evaluation data, at most


def compare_with_checkpoint(model: nn.Module, checkpoint: str, rows: Dataset, batch_size: int = 32) -> dict[str, Any]:
    """Runs the checkpoint as it is and the model with its adapter on the same batches.

    Args:
        model: The PEFT model.
        checkpoint: Folder or Hub repository of the model that it was made from.
        rows: Encoded rows; the first 512 are compared.
        batch_size: Rows per pass.

    Returns:
        `rows`, `equal` (every logit, bit for bit), and the `largest_difference`.
    """
    badge = get_badge_model(model)
    device = next(badge.model.parameters()).device
    with quiet():
        base = AutoModelForSequenceClassification.from_pretrained(checkpoint).to(device).eval()
    features = tensor_columns(badge.model, rows.select(range(min(len(rows), ROWS))))
    for row in features:
        row.pop("labels", None)
    equal, largest = True, 0.0
    with torch.no_grad():
        for start in range(0, len(features), batch_size):
            batch = pad_features(features[start : start + batch_size], badge.model)
            batch = {name: value.to(device) for name, value in batch.items()}
            before, after = base(**batch).logits, badge(**batch).logits
            equal = equal and torch.equal(before, after)
            largest = max(largest, _difference(before, after))
    return {"rows": len(features), "equal": equal, "largest_difference": largest}


def _difference(before: Tensor, after: Tensor) -> float:
    return float((before.float() - after.float()).abs().max())
