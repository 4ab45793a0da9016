"""What every exit of every seed, and the model's own head behind every block, say about a pool: one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from badge_peft import ExitLogits
from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.early_exit.full_depth import FullDepthReader
from badge_peft.early_exit.readers import ExitReader
from badge_peft.evaluation.collate import pad_features
from badge_peft.model import get_badge_model
from ranking_parts.models import encode
from ranking_parts.pools import Pool

BATCH = 64


@dataclass(frozen=True)
class PoolScores:
    """The scores of a pool's N rows.

    Args:
        exits: [R, N, E] float32: of each seed's exits, full depth last.
        numbers: Block numbers of the exits, E.
        head: [N, M] float32: of the model's own head, put behind each block.
        pool: The pool.
    """

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
        logits, labels = torch.from_numpy(scores).unsqueeze(-1), torch.from_numpy(self.pool.labels).float()
        return ExitLogits(logits, labels, numbers, "regression", groups=self.pool.groups)

    @classmethod
    def of(cls, pool: Pool, model: Path, adapters: Sequence[Path], out: Path, max_length: int) -> PoolScores:
        """Of adapters on one model; kept in `out`."""
        if not out.exists():
            np.savez(out, **collect(pool, model, adapters, max_length))
        stored = np.load(out)
        return cls(stored["exits"], stored["numbers"].tolist(), stored["head"], pool)


class HeadReader(ExitReader):
    """Keeps what the model's own head would read behind each block: the first position."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.states: list[Tensor] = []

    def on_exit(self, block: Any, number: int, frame: Any) -> None:
        if number:
            self.states.append(frame.output[:, :1])


@torch.inference_mode()
def collect(pool: Pool, folder: Path, adapters: Sequence[Path], max_length: int) -> dict[str, np.ndarray]:
    """The arrays of `PoolScores`; of models with BERT's head."""
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, adapters[0], adapter_name="seed0")
    for i, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, adapter_name=f"seed{i}")
    badge: Any = get_badge_model(model.eval())
    exits = [badge.adapter_exits(f"seed{i}") for i in range(len(adapters))]
    rows = encode(pool, AutoTokenizer.from_pretrained(folder), max_length)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    found = np.empty((len(adapters), len(rows), len(exits[0].numbers)), dtype=np.float32)
    head = np.empty((len(rows), badge.num_blocks), dtype=np.float32)
    start = time.perf_counter()
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        batch = pad_features([rows[i] for i in part], base)
        mask = batch["attention_mask"]
        readers = [FullDepthReader(each, len(part), mask) for each in exits]
        heads = HeadReader(exits[0], len(part), mask)
        with EarlyExitPass([*readers, heads], len(part), mask, badge.num_blocks):
            full = badge.model(return_dict=True, **batch).logits
        for r, reader in enumerate(readers):
            scores = [reader.exit_logits.get(number, full) for number in reader.exits.numbers]
            found[r, part] = torch.cat(scores, dim=1).numpy()
        pooler, classifier = base.base_model.pooler, base.classifier
        own = [classifier(pooler(states))[:, 0] for states in heads.states]
        head[part] = torch.stack([*own[:-1], full[:, 0]], dim=1).numpy()
    print(f"{pool.name}: {len(rows)} rows scored in {time.perf_counter() - start:.0f} s", flush=True)
    return {"exits": found, "numbers": np.array(exits[0].numbers), "head": head}
