"""`start_exits`: the linear layer of each exit starts as a regression on what the exit reads.

With a frozen backbone this is a convex problem of N x d numbers for each exit: a few seconds
of L-BFGS bring every exit to where a standardized logistic (or linear) regression stands, and the epochs
that follow train bypasses and exits from there. Exits that attend start as they are drawn: a regression fits the
training rows before attention can say anything of them (docs/decisions/conditioned-exits.md).

Source: Liu and Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", 1989.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from badge_peft.model import BadgeModel
from badge_peft.training.criterion import Criterion, rows_of_loss
from badge_peft.training.objectives import GROUPS, Objective, Step
from badge_peft.tuner.exits import Exit

#: C of scikit-learn's LogisticRegression, the inverse weight of |W|^2 / 2 beside the sum of losses: from small to
#: large, for as long as held-out rows gain.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.2
ITERATIONS = 25
START_BATCH = 64
MEMORY, ROWS = 2**29, 2**13  # bytes and rows of what is read, at most


def start_exits(
    badge: BadgeModel, objective: Objective, batches: Iterable[dict[str, Any]], criterion: Criterion
) -> None:
    """Moves the linear layer of each exit of the active adapter, in evaluation mode, to the regression's, by the
    batches that fill `MEMORY` or `ROWS`."""
    exits = {m: exit_ for m, exit_ in _own_exits(badge).items() if exit_.reads_states == ("linear",)}
    if not exits:
        return
    vectors, logits, labels = _read(badge, exits, batches)
    numbers, config = badge.exit_layers(), badge.config_of()
    for m, exit_ in exits.items():
        index = numbers.index(m)

        def loss(own: Tensor, rows: slice, index: int = index) -> Tensor | None:
            each = [x[rows] for x in logits]
            each[index] = own
            targets = None if labels is None else labels[rows]
            step = Step(numbers, each, targets, config.resolved_problem_type, 0, None, criterion, None, False)  # type: ignore[arg-type]
            return objective.start_loss(step, index)

        _fit(exit_.linear, vectors[m], loss)


def _own_exits(badge: BadgeModel) -> dict[int, Exit]:
    adapter = badge.single_active_adapter()
    blocks = {m: badge.block_at(m) for m in badge.exit_layers()}
    return {m: block.own_exit(adapter, m) for m, block in blocks.items() if block.has_exit(adapter, m)}


@torch.no_grad()
def _read(
    badge: BadgeModel, exits: dict[int, Exit], batches: Iterable[dict[str, Any]]
) -> tuple[dict[int, Tensor], list[Tensor], Tensor | None]:
    """What each exit reads of the rows [N, d], the logits of all exits [N, K], and the labels."""
    config = badge.config_of()
    seen: dict[int, list[Tensor]] = {m: [] for m in exits}
    handles = [
        exit_.linear.register_forward_pre_hook(lambda _, args, m=m: seen[m].append(args[0].detach()))
        for m, exit_ in exits.items()
    ]
    logits: list[list[Tensor]] = []
    labels: list[Tensor | None] = []
    size = 0
    try:
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ("labels", GROUPS)}
            out = badge(**inputs)
            mask = inputs.get("attention_mask")
            own, target, _ = rows_of_loss(out.exit_logits, None, batch.get("labels"), mask, config)
            if config.reads_tokens:
                for m in exits:
                    (seen[m][-1],), _, _ = rows_of_loss(
                        seen[m][-1].unsqueeze(1), None, batch.get("labels"), mask, config
                    )
            logits.append(list(own))
            labels.append(target)
            size += sum(seen[m][-1].nbytes for m in exits)
            if size >= MEMORY or sum(map(len, (parts[0] for parts in logits))) >= ROWS:
                break
    finally:
        for handle in handles:
            handle.remove()
    all_logits = [torch.cat(parts) for parts in zip(*logits, strict=True)]
    known = [target for target in labels if target is not None]
    return {m: torch.cat(parts) for m, parts in seen.items()}, all_logits, torch.cat(known) if known else None


def _fit(linear: nn.Linear, vectors: Tensor, loss: Callable[[Tensor, slice], Tensor | None]) -> None:
    """Regressions on (x - mu) / sigma, of which the layer gets the best on held-out rows. Nothing is changed where
    there is no loss, or none that is finite."""
    x = vectors.float()
    mean, sigma = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x = (x - mean) / sigma
    count = max(1, round((1 - HELD_OUT) * len(x)))
    seen, held = slice(0, count), slice(count if count < len(x) else 0, None)
    weight = torch.zeros_like(linear.weight, dtype=torch.float32, requires_grad=True)
    bias = torch.zeros_like(linear.bias, dtype=torch.float32, requires_grad=True)
    best, found = torch.inf, None
    for strength in STRENGTHS:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure(optimizer: Any = optimizer, strength: float = strength) -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                data = loss(x[seen] @ weight.T + bias, seen)
                if data is None:
                    return weight.new_zeros(())
                total = data + weight.square().sum() / (2 * strength * count)
                total.backward()
            return total.detach()

        optimizer.step(closure)
        with torch.no_grad():
            value = loss(x[held] @ weight.T + bias, held)
        if value is None or not float(value) < best:  # NaN is not below
            break
        best, found = float(value), (weight.detach() / sigma, bias.detach().clone())
    if found is None or not bool(found[0].isfinite().all()):
        return
    with torch.no_grad():
        linear.weight.copy_(found[0])
        linear.bias.copy_(found[1] - found[0] @ mean)
