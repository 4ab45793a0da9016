"""`collect_exit_logits`: one full-depth pass over a data set, from which every policy is replayed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.evaluation.collate import SPECIAL, evaluating, labeled_rows, pad_features
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.model import get_badge_model
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_int
from badge_peft.utils.problem import NO_LABEL, problem_of

_LONGEST = 2**20  # tokens of a text, which number them


@torch.no_grad()
def collect_exit_logits(
    model: nn.Module,
    dataset: Any,
    batch_size: int = 32,
    data_collator: Callable[[list[Any]], Any] | None = None,
    progress: bool = False,
    split_between_processes: bool = False,
    cached_states: CachedStates | None = None,
) -> ExitLogits:
    """Runs every row through all blocks once and keeps the logits of every exit.

    Rows are batched by length, so that little is padded; the result is in the order of the data set. Where some rows
    have a label, those without one (none, or -100) are left out, with a warning that counts them. Of token
    classification the rows of the result are tokens, text by text (`ExitLogits.texts`): those with a label, or where
    none has any all that are no padding and, by `special_tokens_mask`, need an answer. Blocks saved are then those of
    calls that ask for the same tokens: `early_exit_forward(..., special_tokens_mask=labels == -100)`.

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
        cached_states: Of these rows (or more), by `cache_states`: no block runs then.

    Raises:
        ValueError: the data set is empty, an argument is out of range, `cached_states` are those of other texts, or
            what `ExitLogits` refuses.
    """
    badge = get_badge_model(model)
    check_int("batch_size", batch_size, at_least=1, optional=False)
    if not len(dataset):
        raise ValueError("the data set is empty: there is nothing to collect.")
    config = badge.config_of()
    tokens = config.reads_tokens
    problem = problem_of(config.resolved_problem_type)
    rows = labeled_rows(badge.model, dataset, config.resolved_labels, problem, tokens)
    if cached_states is not None and not cached_states.have(rows):
        raise ValueError("cached_states are those of other texts: make them with cache_states(model, dataset).")
    collate = data_collator or (lambda batch: pad_features(batch, badge.model, tokens))
    device = next(badge.model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, size = distributed.rank_world() if split_between_processes else (0, 1)
    found = []  # of each batch the numbers of its rows, and logits, labels and uncertainty
    with evaluating(model):
        for numbers in tqdm(batches[rank::size], desc="exit logits", disable=not (progress and distributed.is_main())):
            batch = {name: value.to(device) for name, value in collate([rows[i] for i in numbers]).items()}
            labels, special = batch.pop("labels", None), batch.pop(SPECIAL, None)
            if cached_states is not None:
                batch |= {"cached_states": cached_states, "cached_rows": cached_states.find(batch)}
            output = badge(**batch)
            kept = (output.exit_logits.float(), labels, output.exit_uncertainty)
            if tokens:
                asked = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
                if labels is not None:
                    asked &= labels != NO_LABEL
                elif special is not None:
                    asked &= special == 0
                kept, numbers = _by_token(kept, asked, numbers)
            found.append((numbers, *(None if x is None else x.cpu() for x in kept)))
    if size > 1:
        found = distributed.gather(found)
    numbers, *parts = zip(*found, strict=True)
    order_found = torch.tensor(list(chain.from_iterable(numbers)))
    back = order_found.argsort()
    labels, uncertainty = (None if part[0] is None else torch.cat(part)[back] for part in parts[1:])
    logits = torch.cat(parts[0])[back]
    deployed = config.final_exit == "base_head" and not config.train_head and config.backbone == "frozen"
    return ExitLogits(
        logits,
        labels,
        badge.exit_layers(),
        problem.name,
        badge.num_blocks,
        uncertainty,
        badge.weights_hash(),
        deployed,
        texts=order_found[back] // _LONGEST if tokens else None,
        label_names=badge.label_names() if tokens else None,
    )


def _by_token(
    kept: tuple[Tensor, Tensor | None, Tensor | None], asked: Tensor, numbers: list[int]
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], list[int]]:
    """Logits [B, E, S, K], labels [B, S] and uncertainty [B, E, S] of a batch with the tokens that are `asked` [B, S]
    as rows, and a number for each, by which they are in the order of the texts and of their tokens."""
    logits, labels, uncertainty = kept
    row, position = asked.nonzero(as_tuple=True)
    tokens = [numbers[i] * _LONGEST + j for i, j in zip(row.tolist(), position.tolist(), strict=True)]
    doubts = None if uncertainty is None else uncertainty.transpose(1, 2)[asked]
    return (logits.transpose(1, 2)[asked], None if labels is None else labels[asked], doubts), tokens
