"""What the demo has measured, as `report.json` and as tables."""

from __future__ import annotations

import sys
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.latency import LatencyReport
from badge_peft.evaluation.metrics import ExitScores
from badge_peft.workflows.tables import text_table


def early_exit_entry(config: EarlyExitConfig, latency: LatencyReport, accuracy: float) -> dict[str, Any]:
    """The entry `early_exit` of the report: everything in it was measured on the test split at batch size 1."""
    calibration = config.calibration or {}
    return {
        "policy": config.policy,
        "divergence": config.divergence,
        "threshold": config.threshold,
        "patience": config.patience,
        "depth": config.depth,
        "accuracy": accuracy,
        "mean_exit": latency.mean_exit,
        "layer_speedup": latency.layer_speedup,
        "wall_clock_speedup": latency.speedup_paper,
        "speedup_ratio": latency.speedup_ratio,
        "p50_ms": latency.p50_ms,
        "p95_ms": latency.p95_ms,
        "full_depth_p50_ms": latency.full_depth_p50_ms,
        "full_depth_p95_ms": latency.full_depth_p95_ms,
        "validation": {name: calibration.get(name) for name in ("rows", "score", "full_depth_score", "layer_speedup")},
    }


def exit_table(scores: ExitScores, test: ExitLogits, latency: LatencyReport) -> str:
    """One line per exit: how good it is for all rows, how many rows it answered, and how well."""
    assert test.labels is not None
    labels = test.labels.tolist()
    lines = []
    for number, accuracy in zip(scores.exit_layers, scores.per_exit, strict=True):
        here = [i for i, exit_ in enumerate(latency.exit_layer) if exit_ == number]
        right = sum(latency.predictions[i] == labels[i] for i in here)
        answered = f"{len(here) / len(labels):.1%}"
        lines.append([str(number), f"{accuracy:.1%}", answered, f"{right / len(here):.1%}" if here else "-"])
    return text_table(["exit", "accuracy, all rows", "rows answered here", "accuracy, these rows"], lines)


def summary_table(report: dict[str, Any]) -> str:
    """Full depth beside early exits."""
    early = report["early_exit"]
    return text_table(
        ["test split, batch size 1", "full depth", "early exits", "saved"],
        [
            ["accuracy", f"{report['full_depth_accuracy']:.1%}", f"{early['accuracy']:.1%}", ""],
            [
                "blocks per row",
                str(report["num_blocks"]),
                f"{early['mean_exit']:.2f}",
                f"{early['layer_speedup']:.1%}",
            ],
            [
                "time, all rows",
                "1.00",
                f"{1 - early['wall_clock_speedup']:.2f}",
                f"{early['wall_clock_speedup']:.1%}",
            ],
            ["time, p50 (ms)", f"{early['full_depth_p50_ms']:.2f}", f"{early['p50_ms']:.2f}", ""],
            ["time, p95 (ms)", f"{early['full_depth_p95_ms']:.2f}", f"{early['p95_ms']:.2f}", ""],
        ],
    )


def peak_memory_mb() -> float | None:
    """The most memory that this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
