"""Training exits for ranking: they learn full depth's own scores of a query's candidates, and their order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.training.objectives import GROUPS, Objective, Step, check_earlier_exits
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils.checks import check_number


@dataclass
class RankingDistillation(Objective):
    """Every exit below M follows exit M's scores: the squared difference, and within each query the distribution that
    a softmax makes of the scores of its candidates (ListNet). No labels are needed.

    Batches have `groups` [B], a number for each row that is the same for the candidates of a query (`QueryCollator`);
    without them all rows are one query. Source of the listwise term: Cao et al., "Learning to Rank: From Pairwise
    Approach to Listwise Approach", ICML 2007.

    Args:
        squared: Weight of the squared difference; 0 leaves it out.
        listwise: Weight of the listwise term; 0 leaves it out.
        weights: As for `Objective`.
        temperature: Of the listwise term; as for `Objective`.
    """

    squared: float = 1.0
    listwise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("squared", "listwise"):
            check_number(name, getattr(self, name), lambda weight: weight >= 0, "it must be 0 or more")
        if not self.squared + self.listwise:
            raise ValueError("squared=0 and listwise=0 leave nothing to learn: give one of them a weight.")

    def check(self, config: BadgeConfig, exits: list[int]) -> None:
        super().check(config, exits)
        check_earlier_exits("objective=RankingDistillation()", exits)
        if config.resolved_labels != 1:
            raise ValueError(
                f"the model has {config.resolved_labels} outputs, and candidates are ranked by one score: load it "
                "with num_labels=1."
            )
        if config.backbone != "frozen" or config.train_head or config.final_exit != "base_head":
            raise ValueError(
                "ranking exits follow full depth's scores, which must not change: use backbone='frozen', "
                "train_head=False and final_exit='base_head'."
            )

    @property
    def reads_labels(self) -> bool:
        return False

    def exit(self, step: Step, index: int) -> Tensor | None:
        if index == len(step.exits) - 1:
            return None
        student, teacher = step.logits[index][:, 0].float(), step.logits[-1][:, 0].detach().float()
        loss = self.squared * F.mse_loss(student, teacher)
        if self.listwise:
            loss = loss + self.listwise * listwise_loss(student, teacher, step.groups, self.temperature)
        return loss

    def start_loss(self, step: Step, index: int) -> Tensor | None:
        """The squared error alone: rows of many queries come at once."""
        return replace(self, squared=1.0, listwise=0.0).exit(step, index)


def listwise_loss(student: Tensor, teacher: Tensor, groups: Tensor | None, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of the distributions over each query's candidates, from scores [B] and the number [B]
    of each one's query (None: all are of one); the mean over queries."""
    if groups is None:
        groups = torch.zeros(len(student), dtype=torch.long, device=student.device)
    other = groups[:, None] != groups[None, :]  # [B, B]
    log_q, log_p = (x / temperature - _log_sum(x / temperature, other) for x in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum() / len(groups.unique()) * temperature**2


def _log_sum(scores: Tensor, other: Tensor) -> Tensor:
    """[B]: the log of the sum of exp(score) over each row's query."""
    return scores.expand(len(scores), -1).masked_fill(other, -torch.inf).logsumexp(dim=1)


def query_batches(query_ids: Sequence[Any], batch_size: int, seed: int = 0) -> list[list[int]]:
    """Rows in batches of at most `batch_size`, with as many candidates of a query together as fit.

    Args:
        query_ids: An id for each row.
        batch_size: Rows at most.
        seed: Of the order of queries and of their candidates.
    """
    draw = random.Random(seed)
    rows: dict[Any, list[int]] = {}
    for i, query in enumerate(query_ids):
        rows.setdefault(query, []).append(i)
    lists = []
    for candidates in rows.values():
        draw.shuffle(candidates)
        parts = -(-len(candidates) // batch_size)
        lists += [candidates[part::parts] for part in range(parts)]  # of about the same length
    draw.shuffle(lists)
    batches: list[list[int]] = []
    for part in lists:
        if batches and len(batches[-1]) + len(part) <= batch_size:
            batches[-1] += part
        else:
            batches.append(list(part))
    return batches


@dataclass
class QueryCollator:
    """For a data set whose items are whole batches, lists of rows as `query_batches` puts them together: pads the rows
    of an item and puts their `groups` beside them.

    Args:
        pad: Makes a batch of rows, such as `DataCollatorWithPadding`.
    """

    pad: Callable[[list[Any]], Any]

    def __call__(self, items: Iterable[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """Rows have a number of their query in `groups`, beside their tokens."""
        rows = [dict(row) for row in chain.from_iterable(items)]
        groups = torch.tensor([row.pop(GROUPS) for row in rows])
        return {**self.pad(rows), GROUPS: groups}


def holds_batches(rows: Any) -> bool:
    """Whether the items of a data set are lists of rows."""
    return hasattr(rows, "__len__") and len(rows) > 0 and isinstance(rows[0], list)


def flat_rows(rows: Any) -> list[Any]:
    """The rows of a data set, or of all of its items."""
    items = [rows[i] for i in range(len(rows))]
    return [*chain.from_iterable(items)] if holds_batches(rows) else items
