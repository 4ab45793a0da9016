"""What early answers save and cost: rules are chosen on the validation rows of a run, and its test rows answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import calibrated

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits, exit_scores
from badge_peft.utils.files import write_json
from paper_grid.records import Record
from paper_grid.store import Store

DROP = 0.005  # half a point
SHARE = 0.75  # of the blocks
GOALS: dict[str, dict[str, float]] = {"drop": {"max_score_drop": DROP}, "share": {"target_blocks_saved": SHARE}}


class Savings:
    """The policies of stored runs. A calibration takes a while, so they are kept beside the runs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.path = Path(store.root, "rules.json")
        self._kept: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def rule(self, record: Record, goal: str) -> EarlyExitConfig:
        """What `calibrate(policy="auto")` takes on the validation rows; `goal` is a key of `GOALS`."""
        rules = self._kept.setdefault(record.result["key"], {})
        if goal not in rules:
            validation = self.store.logits(record.settled, "validation")
            found = calibrated(validation, "auto", metric=record.settled["metric"], **GOALS[goal])
            rules[goal] = EarlyExitConfig.of(found, calibration=None).to_dict()
            write_json(self.path, self._kept)
        return EarlyExitConfig.of(rules[goal])

    def answers(self, record: Record, goal: str) -> tuple[ExitLogits, float]:
        """What the test rows are answered, as the logits of a single exit, and the share of the blocks saved."""
        test = self.store.logits(record.settled, "test")
        blocks = build_policy(self.rule(record, goal)).replay_history(test.history())
        chosen = torch.from_numpy(np.searchsorted(test.exits, blocks))
        logits = test.logits[torch.arange(len(test)), chosen].unsqueeze(1)
        return ExitLogits(
            logits,
            test.labels,
            [test.depth],
            test.kind,
        ), 1 - float(blocks.mean()) / test.depth

    def within_drop(self, record: Record) -> tuple[float, float]:
        """Share of blocks saved for half a point, and points lost against the exit that is best on validation rows."""
        metric = record.settled["metric"]
        answers, saved = self.answers(record, "drop")
        validation, test = (self.store.logits(record.settled, split) for split in ("validation", "test"))
        best = validation.exits.index(exit_scores(validation, metric).best_exit)
        return saved, 100 * (exit_scores(test, metric).per_exit[best] - exit_scores(answers, metric).best)
