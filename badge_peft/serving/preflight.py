"""What would keep every replica from starting is said before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.controller import LatencyController
from badge_peft.serving.engine import MAIN
from badge_peft.serving.settings import ServiceSettings

ONE_ADAPTER = "a target is for a service of one adapter: of many tasks, set each one's threshold."


def check_target(settings: ServiceSettings) -> None:
    """Refuses a target that cannot be kept by moving along a stored curve. An adapter that lies in a repository is
    checked when it is there, by the replicas.

    Raises:
        ValueError: many tasks, no curve, a floor that no point keeps, or points at which a file cannot answer.
    """
    if settings.target is None:
        return
    folder = None if isinstance(settings.adapter, dict) else Path(settings.adapter)
    if folder is None or (folder / "tasks.json").exists():
        raise ValueError(ONE_ADAPTER)
    config = folder / ("early_exit.json" if settings.onnx else "adapter_config.json")
    if not config.exists():
        return
    facts: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    if "tasks" in facts:
        raise ValueError(ONE_ADAPTER)
    own = EarlyExitConfig.of(facts.get("early_exit"))
    controller = LatencyController.for_adapter(own, settings.target, settings.max_score_drop)
    if settings.onnx:
        from badge_peft.serving.onnx_engine import FileCheck, FixedRule

        check = FileCheck({MAIN: FixedRule.of(facts, facts["num_blocks"])})
        for point in controller.points:
            check(MAIN, point.config)
