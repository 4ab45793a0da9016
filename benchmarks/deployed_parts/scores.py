"""What an adapter keeps and saves on test rows; its policy was calibrated on validation rows alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from badge_peft import EarlyExitConfig
from badge_peft.evaluation import ExitLogits
from badge_peft.evaluation.costs import CostModel
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.calibrate import choose
from badge_peft.workflows.evaluate import evaluate_adapter, measure
from badge_peft.workflows.settings import Goal

DROPS = (0.01, 0.005)


def score_adapter(folder: Path, test: Path, pool: Path) -> dict[str, Any]:
    """Scores, agreement and blocks saved on test rows, JSON-able; the logits of validation and test rows go into the
    file `pool`, which `promises.py` reads."""
    adapter = open_adapter(folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found, logits = evaluate_adapter(adapter, adapter.read(test), report["metric"])
    validation = ExitLogits.load(folder / "exit_logits.safetensors")
    _join(validation, logits, pool)
    own = adapter.badge.get_early_exit_config()
    stored = own.calibration or {}
    costs = CostModel.from_dict(stored["costs"]) if "costs" in stored else None
    depths = {}
    for drop in DROPS:
        config = (
            own
            if drop == DROPS[0]
            else choose(
                validation,
                Goal(max_score_drop=drop),
                report["metric"],
                costs,
            )[0]
        )
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


def _join(validation: ExitLogits, test: ExitLogits, pool: Path) -> None:
    """Writes both as one, where each row stops by itself."""
    if validation.texts is None and validation.labels is not None and test.labels is not None:
        rows = [torch.cat([each.logits for each in (validation, test)]), torch.cat([validation.labels, test.labels])]
        pool.parent.mkdir(parents=True, exist_ok=True)
        replace(validation, logits=rows[0], labels=rows[1], uncertainty=None).save(pool)


def _fixed(report: dict[str, Any], drop: float) -> EarlyExitConfig:
    """The shallowest exit that keeps the model's score on validation rows to within the drop."""
    scores = zip(report["exit_layers"], report["per_exit"], strict=True)
    least = report["full_depth_score"] - drop
    return EarlyExitConfig(policy="fixed_depth", depth=next(m for m, value in scores if value >= least))


def _early(measured: dict[str, Any]) -> dict[str, Any]:
    found = measured["early_exit"]
    names = ("score", "mean_exit", "blocks_saved", "answers_as_full_depth")
    return {"policy": found["config"]["policy"], **{name: found[name] for name in names}}
