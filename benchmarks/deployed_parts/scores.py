"""What an adapter keeps and saves on test rows; its policy was calibrated on validation rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from badge_peft import EarlyExitConfig
from badge_peft.evaluation import ExitLogits
from badge_peft.evaluation.costs import CostModel
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.calibrate import choose
from badge_peft.workflows.evaluate import evaluate_adapter, measure
from badge_peft.workflows.goal import Goal

DROPS = (0.01, 0.005)


def score_adapter(folder: Path, test: Path) -> dict[str, Any]:
    """Scores, agreement and blocks saved on test rows, JSON-able.

    Args:
        folder: Of the adapter, as `badge-peft train` wrote it.
        test: File of labeled test rows.
    """
    adapter = open_adapter(folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found, logits = evaluate_adapter(adapter, adapter.read(test), report["metric"])
    validation = ExitLogits.load(folder / "exit_logits.safetensors")
    own = adapter.badge.get_early_exit_config()
    stored = own.calibration or {}
    costs = CostModel.from_dict(stored["costs"]) if "costs" in stored else None
    depths = {}
    for drop in DROPS:
        config = own if drop == DROPS[0] else choose(validation, Goal(max_score_drop=drop), report["metric"], costs)[0]
        depths[str(drop)] = {
            **_early(measure(logits, config, report["metric"])),
            "expected_time_saved": (config.calibration or {}).get("time_saved"),
            "fixed_depth": _early(measure(logits, _fixed(report, drop), report["metric"])),
        }
    return {
        "rows": found["rows"],
        "metric": report["metric"],
        "num_blocks": found["num_blocks"],
        "model": found["full_depth_score"],
        "exit_layers": found["exit_layers"],
        "per_exit": found["per_exit"],
        "forms": report["forms"],
        "policy": own.policy,
        "seconds": report["seconds"],
        "parameters": report["trainable_parameters"],
        "drops": depths,
    }


def _fixed(report: dict[str, Any], drop: float) -> EarlyExitConfig:
    """The shallowest exit that keeps the model's score on validation rows to within the drop."""
    scores = zip(report["exit_layers"], report["per_exit"], strict=True)
    least = report["full_depth_score"] - drop
    return EarlyExitConfig(policy="fixed_depth", depth=next(m for m, value in scores if value >= least))


def _early(measured: dict[str, Any]) -> dict[str, Any]:
    found = measured["early_exit"]
    names = ("score", "mean_exit", "layer_speedup", "answers_as_full_depth")
    return {"policy": found["config"]["policy"], **{name: found[name] for name in names}}
