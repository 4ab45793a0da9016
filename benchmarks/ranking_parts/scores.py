"""What every exit of every seed, and the model's own head behind every block, say about a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from badge_peft import ExitLogits, collect_exit_logits, load_pretrained
from badge_peft.evaluation.collate import pad_features
from ranking_parts.models import encode
from ranking_parts.pools import Pool

BATCH = 64


@dataclass(frozen=True)
class PoolScores:
    """The scores of a pool's N rows, float32: [R, N, E] of each seed's exits, full depth last, whose block numbers are
    `numbers`, and [N, M] of the model's own head, put behind each block."""

    exits: np.ndarray
    numbers: list[int]
    head: np.ndarray
    pool: Pool

    @property
    def full(self) -> np.ndarray:
        """[N], full depth."""
        return self.head[:, -1]

    def select(self, queries: Sequence[str]) -> PoolScores:
        """The rows of some queries alone."""
        wanted = set(queries)
        rows = [i for i, row in enumerate(self.pool.rows) if row["query_id"] in wanted]
        pool = Pool(self.pool.name, [self.pool.rows[i] for i in rows])
        return PoolScores(self.exits[:, rows], self.numbers, self.head[rows], pool)

    def of_seed(self, i: int) -> ExitLogits:
        """What `calibrate_ranking` reads, of the i-th seed."""
        return self._stored(self.exits[i], self.numbers)

    def of_head(self) -> ExitLogits:
        """The same of the model's own head."""
        return self._stored(self.head, list(range(1, self.head.shape[1] + 1)))

    def _stored(self, scores: np.ndarray, numbers: list[int]) -> ExitLogits:
        logits = torch.from_numpy(scores).unsqueeze(-1)
        labels = torch.from_numpy(self.pool.labels).float()
        return ExitLogits(logits, labels, numbers, "regression", groups=self.pool.groups)

    @classmethod
    def of(cls, pool: Pool, model: Path, adapters: Sequence[Path], out: Path, max_length: int) -> PoolScores:
        """Of adapters on one model; kept in `out`."""
        if not out.exists():
            np.savez(out, **collect(pool, model, adapters, max_length))
        stored = np.load(out)
        return cls(stored["exits"], stored["numbers"].tolist(), stored["head"], pool)


@torch.inference_mode()
def collect(pool: Pool, folder: Path, adapters: Sequence[Path], max_length: int) -> dict[str, np.ndarray]:
    """The arrays of `PoolScores`; of models with BERT's head."""
    base = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = encode(pool, AutoTokenizer.from_pretrained(folder), max_length)
    found = [collect_exit_logits(load_pretrained(str(adapter)), rows, BATCH) for adapter in adapters]
    head = np.empty((len(rows), base.config.num_hidden_layers), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        batch = pad_features([rows[i] for i in part], base)
        states = base(**batch, output_hidden_states=True).hidden_states[1:]
        head[part] = torch.cat([base.classifier(base.base_model.pooler(state)) for state in states], dim=1).numpy()
    exits = np.stack([one.logits[:, :, 0].numpy() for one in found])
    head[:, -1] = exits[0, :, -1]  # to the last bit, which batches decide
    print(f"{pool.name}: {len(rows)} rows scored", flush=True)
    return {"exits": exits, "numbers": np.array(found[0].exits), "head": head}
