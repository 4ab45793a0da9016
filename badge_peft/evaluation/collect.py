"""`collect_exit_logits`: one full-depth pass over a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.model import get_badge_model
from badge_peft.utils import distributed

_Answers = tuple[Tensor | None, ...]  # of one batch: logits, labels, doubts


@torch.no_grad()
def collect_exit_logits(
    model: nn.Module,
    dataset: Any,
    batch_size: int = 32,
    data_collator: Callable[[list[Any]], Any] | None = None,
    progress: bool = False,
    split_between_processes: bool = False,
) -> ExitLogits:
    """Runs every row through all blocks once and keeps the logits of every exit.

    Rows are batched by length, so that little is padded; the result is in the order of the data set.

    Args:
        model: A PEFT model with an active BADGE adapter. Its training mode is restored afterwards.
        dataset: Rows of features (`input_ids`, `attention_mask`, ..., `label` or `labels`): a `datasets.Dataset` or
            any sequence of dicts. Columns that the model does not read (text, say) are left out.
        batch_size: Rows per pass.
        data_collator: Makes a batch of rows; None pads with the model's `pad_token_id`.
        progress: Show a progress bar, in the main process.
        split_between_processes: Under `accelerate launch` or `torchrun`, run a part of the batches in each process and
            give all of them to each; every process has to make the call, with the same data. False: each call runs all
            rows by itself.

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
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, size = distributed.together() if split_between_processes else (0, 1)
    mine = range(rank, len(batches), size)
    found: list[tuple[int, _Answers]] = []
    was_training = model.training
    model.eval()
    try:
        for number in tqdm(mine, desc="exit logits", disable=not (progress and distributed.is_main())):
            batch = collate([rows[i] for i in batches[number]])
            batch = {k: v.to(device) for k, v in batch.items()}
            target = batch.pop("labels", None)
            output = badge(**batch)
            target = None if target is None else target.cpu()
            found.append((number, (_stored(output.exit_logits), target, _stored(output.exit_uncertainty))))
    finally:
        model.train(was_training)
    if size > 1:
        found = sorted(distributed.gather(found), key=lambda item: item[0])
    logits, labels, doubts = ([x for x in kind if x is not None] for kind in zip(*(a for _, a in found), strict=True))
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


def _stored(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float().cpu()
