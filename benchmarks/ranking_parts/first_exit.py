"""What exit 0 should read of a pair: the mean of its token embeddings, or how query and document match in them.

    match_i = max over the document's tokens j of cos(P e_i, P e_j), for each token i of the query
    vector = mean_i match_i e_i, beside the mean of all e_i; a linear layer gives the score

No block runs: each way learns the full-depth scores of the validation pool, and takes the place of exit 0 in the
scores of the test pool, where the margins of one half of the queries are measured on the other. Source of the match:
Khattab and Zaharia, "ColBERT", SIGIR 2020, whose sum over the query's best matches this weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from badge_peft import ExitLogits
from badge_peft.evaluation.collate import pad_features
from badge_peft.ranking import calibrate_ranking
from badge_peft.training import query_batches
from badge_peft.training.ranking import listwise_loss
from ranking_parts.models import encode
from ranking_parts.quality import KEEP, rank_correlation, ranked_by
from ranking_parts.scores import PoolScores

EPOCHS, BATCH, RATE, RANK = 5, 40, 1e-2, 32
Batch = dict[str, Tensor]


class Mean(nn.Module):
    """A linear layer on the mean embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """[B, S, d] -> [B]."""
        return self.linear(_mean(states, batch["attention_mask"]))[:, 0]


class Match(Mean):
    """The same, and one on the query's embeddings, each times its best match in the document."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.project = nn.Linear(width, RANK, bias=False)
        self.weight = nn.Linear(width, 1, bias=False)

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """[B, S, d] -> [B]."""
        real, second = batch["attention_mask"] != 0, batch["token_type_ids"] != 0
        unit = F.normalize(self.project(states), dim=-1)
        similar = (unit @ unit.transpose(1, 2)).masked_fill(~(real & second)[:, None], -1)  # [B, S, S]
        matched = states * similar.amax(dim=-1, keepdim=True)
        return super().forward(states, batch) + self.weight(_mean(matched, real & ~second))[:, 0]


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.bmm(weights.unsqueeze(1), states).squeeze(1)


def compare_first_exits(
    folder: Path, validation: PoolScores, test: PoolScores, max_length: int
) -> list[dict[str, Any]]:
    """For each way and k: blocks saved, queries kept, and the rank correlation of exit 0 with full depth."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pools = [encode(scores.pool, tokenizer, max_length, return_token_type_ids=True) for scores in (validation, test)]

    def embed(rows: list[dict[str, Any]]) -> tuple[Tensor, Batch]:
        batch = pad_features(rows, model)
        with torch.no_grad():
            return model.base_model.embeddings(batch["input_ids"], batch["token_type_ids"]), batch

    found = []
    for name, kind in (("none", None), ("mean", Mean), ("match", Match)):
        scores, numbers = test.exits[0], test.numbers
        if kind is None:
            scores, numbers = scores[:, 1:], numbers[1:]
        else:
            torch.manual_seed(0)
            exit_ = kind(model.config.hidden_size)
            _fit(exit_, embed, pools[0], validation)
            scores = np.concatenate([_scores(exit_, embed, pools[1])[:, None], scores[:, 1:]], axis=1)
        for k in (3, 10):
            found.append({"exit 0": name, "top_k": k, **_halves(test, scores, numbers, k)})
            print(found[-1], flush=True)
    return found


def _fit(exit_: nn.Module, embed: Callable[..., tuple[Tensor, Batch]], rows: list[Any], scores: PoolScores) -> None:
    wanted, codes = torch.from_numpy(scores.full), scores.of_seed(0).groups
    batches = query_batches(scores.pool.groups, BATCH)
    optimizer, steps = torch.optim.AdamW(exit_.parameters(), lr=RATE), EPOCHS * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (0.1 * steps), (steps - i) / steps)
    )
    draw = np.random.default_rng(0)
    for i in (i for _ in range(EPOCHS) for i in draw.permutation(len(batches))):
        found = exit_(*embed([rows[row] for row in batches[i]]))
        target = wanted[batches[i]]
        loss = F.mse_loss(found, target) + listwise_loss(found, target, codes[batches[i]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def _scores(exit_: nn.Module, embed: Callable[..., tuple[Tensor, Batch]], rows: list[Any]) -> np.ndarray:
    return torch.cat([exit_(*embed(rows[start : start + BATCH])) for start in range(0, len(rows), BATCH)]).numpy()


def _halves(test: PoolScores, scores: np.ndarray, numbers: list[int], k: int) -> dict[str, Any]:
    """Margins of each half of the queries, measured on the other."""
    stored = ExitLogits(
        torch.from_numpy(scores).unsqueeze(-1),
        torch.from_numpy(test.pool.labels).float(),
        numbers,
        "regression",
        groups=test.pool.groups,
    )
    even = stored.groups % 2 == 0
    halves = [stored.select(even), stored.select(~even)]
    measured = [
        ranked_by(other, calibrate_ranking(own, top_k=k, keep=KEEP)).measure(k)
        for own, other in (halves, halves[::-1])
    ]
    first = rank_correlation(scores, stored.groups.numpy())[0]
    return {"correlation": first, **{key: float(np.mean([m[key] for m in measured])) for key in ("saved", "kept")}}
