"""What `bench` says about each contender: time, score, agreement with full depth; and the table of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import score
from badge_peft.model import get_badge_model
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.adapter import Adapter
from badge_peft.workflows.base import keeps_answers
from badge_peft.workflows.contenders import Contender
from badge_peft.workflows.measure import default_metric, show
from badge_peft.workflows.tables import text_table


class Judge:
    """From times and answers to the line of a contender.

    Args:
        adapter: What is timed.
        labels: [N], or [N, K]; None where the data has none.
        full_depth: [N, K], what the adapter's model answers when nobody leaves.
        metric: None is accuracy, for regression Pearson.
    """

    def __init__(
        self, adapter: Adapter, labels: torch.Tensor | None, full_depth: np.ndarray, metric: str | None
    ) -> None:
        self.kind = adapter.labels.problem_type
        self.labels, self.full_depth = labels, full_depth
        self.metric = metric or default_metric(self.kind)
        self.blocks = get_badge_model(adapter.model).num_blocks
        self.base_answers = keeps_answers(adapter.model)

    def result(
        self, contender: Contender, seconds: list[float], logits: np.ndarray, exits: np.ndarray | None
    ) -> dict[str, Any]:
        """One of the `results` of `bench_adapter`; seconds [batches], logits [N, K], exits [N] where there are any."""
        judged = contender.exits or self.base_answers
        return {
            "name": contender.name,
            "p50_ms": 1e3 * float(np.percentile(seconds, 50)),
            "p95_ms": 1e3 * float(np.percentile(seconds, 95)),
            "examples_per_s": len(logits) / sum(seconds),
            "mean_exit": float(self.blocks if exits is None else exits.mean()),
            "score": self._score(logits) if judged else None,
            "answers_as_full_depth": self._agreement(logits) if judged else None,
        }

    def _score(self, logits: np.ndarray) -> float | None:
        if self.labels is None:
            return None
        answers = torch.from_numpy(logits)
        return score(ExitLogits(answers[:, None], self.labels, problem_type=self.kind), answers, self.metric)

    def _agreement(self, logits: np.ndarray) -> float | None:
        return problem_of(self.kind).same(torch.from_numpy(logits), torch.from_numpy(self.full_depth))


def bench_table(report: dict[str, Any]) -> str:
    """One line per contender."""
    metric = report["metric"]
    unit = "text" if report["batch_size"] == 1 else f"batch of {report['batch_size']}"
    header = ["", f"p50 ms per {unit}", "p95 ms", "texts/s", "mean exit", metric.replace("_", " "), "as full depth"]
    lines = []
    for row in report["results"]:
        same = row["answers_as_full_depth"]
        lines.append(
            [
                row["name"],
                f"{row['p50_ms']:.2f}",
                f"{row['p95_ms']:.2f}",
                f"{row['examples_per_s']:.1f}",
                f"{row['mean_exit']:.2f}",
                "-" if row["score"] is None else show(row["score"], metric),
                "-" if same is None else f"{same:.1%}",
            ]
        )
    return text_table(header, lines)


def bench_summary(report: dict[str, Any]) -> str:
    """How it was measured, in a few lines."""
    where = report["device"] if report["device"] != "cpu" else "the CPU"
    return (
        f"exit rule: {describe(EarlyExitConfig.of(report['rule']))}\n"
        f"{report['rows']} texts, batch size {report['batch_size']}, {report['threads']} threads each, in turn; "
        f"PyTorch on {where}, ONNX Runtime on the CPU without spinning; the tokenizer's time is not in it"
    )
