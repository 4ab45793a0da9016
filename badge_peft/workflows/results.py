"""What `bench` tells of each runner: time, score, agreement with full depth; and the table of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import score
from badge_peft.evaluation.timing import Timed
from badge_peft.model import get_badge_model
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.base_model import keeps_answers
from badge_peft.workflows.evaluate import agreement
from badge_peft.workflows.report import show, text_table
from badge_peft.workflows.runners import NamedRunner


@dataclass(frozen=True)
class Results:
    """Makes a row of results of a runner's times and predictions.

    Args:
        adapter: What is timed.
        labels: [N], or [N, K]; None where the data has none.
        full_depth: [N, K], what the adapter's model answers when nobody leaves.
        metric: As for `exit_scores`.
    """

    adapter: Adapter
    labels: torch.Tensor | None
    full_depth: np.ndarray
    metric: str

    def row(self, runner: NamedRunner, timed: Timed) -> dict[str, Any]:
        """One of the `results` of `bench_adapter`."""
        logits = np.concatenate([logits for logits, _ in timed.outputs])  # [N, K]
        exits = [exits for _, exits in timed.outputs if exits is not None]  # of each batch [B]
        kind, answers = self.adapter.labels.problem_type, torch.from_numpy(logits)
        comparable = runner.exits or keeps_answers(self.adapter.model)
        of_score = comparable and self.labels is not None
        depth = get_badge_model(self.adapter.model).num_blocks
        return {
            "name": runner.name,
            "p50_ms": 1e3 * float(np.percentile(timed.seconds, 50)),
            "p95_ms": 1e3 * float(np.percentile(timed.seconds, 95)),
            "examples_per_s": len(logits) / sum(timed.seconds),
            "mean_exit": float(np.concatenate(exits).mean() if exits else depth),
            "score": (
                score(ExitLogits(answers[:, None], self.labels, problem_type=kind), answers, self.metric)
                if of_score
                else None
            ),
            "answers_as_full_depth": (
                agreement(answers, torch.from_numpy(self.full_depth), kind) if comparable else None
            ),
        }


def bench_table(report: dict[str, Any]) -> str:
    """One line per runner."""
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
