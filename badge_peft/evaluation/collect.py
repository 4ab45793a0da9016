"""`collect_exit_logits`: one full-depth pass over a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from badge_peft.early_exit.forward import get_badge_model
from badge_peft.evaluation.exits import ExitLogits
from badge_peft.evaluation.features import pad_features, tensor_columns


@torch.no_grad()
def collect_exit_logits(
    model: nn.Module,
    dataset: Any,
    batch_size: int = 32,
    data_collator: Callable[[list[Any]], Any] | None = None,
    progress: bool = False,
) -> ExitLogits:
    """Runs every row through all blocks once and keeps the logits of every exit.

    Rows are batched by length, so that little is padded; the result is in the order of the data set.

    Args:
        model: A PEFT model with an active BADGE adapter. Its training mode is restored afterwards.
        dataset: Rows of features (`input_ids`, `attention_mask`, ..., `label` or `labels`): a `datasets.Dataset` or
            any sequence of dicts. Columns that the model does not read (text, say) are left out.
        batch_size: Rows per pass.
        data_collator: Makes a batch of rows; None pads with the model's `pad_token_id`.
        progress: Show a progress bar.

    Raises:
        ValueError: the data set is empty.
    """
    badge = get_badge_model(model)
    if not len(dataset):
        raise ValueError("the data set is empty: there is nothing to collect.")
    config = badge.config_of()
    rows = tensor_columns(badge.model, dataset)
    collate = data_collator or (lambda batch: pad_features(batch, badge.model))
    device = next(badge.model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    doubts: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        starts: Sequence[int] = range(0, len(order), batch_size)
        for start in tqdm(starts, desc="exit logits", disable=not progress):
            batch = collate([rows[i] for i in order[start : start + batch_size]])
            batch = {k: v.to(device) for k, v in batch.items()}
            target = batch.pop("labels", None)
            if target is not None:
                labels.append(target.cpu())
            output = badge(**batch)
            logits.append(output.exit_logits.float().cpu())
            if output.exit_doubts is not None:
                doubts.append(output.exit_doubts.float().cpu())
    finally:
        model.train(was_training)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return ExitLogits(
        torch.cat(logits)[back],
        torch.cat(labels)[back] if labels else None,
        badge.exit_layers(),
        config.resolved_problem_type,
        badge.num_blocks,
        torch.cat(doubts)[back] if doubts else None,
    )
