"""What would keep every replica from starting is said before anything starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badge_peft.bundle import find_tasks
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.base_engine import MAIN, check_texts
from badge_peft.serving.controller import LatencyController
from badge_peft.serving.settings import ServiceSettings

ONE_ADAPTER = "a target is for a service of one adapter: of many tasks, set each one's threshold."


def check_goal(target: float | None, max_score_drop: float) -> None:
    """Refuses a target that no service can have, and a floor below all scores, with a ValueError."""
    if target is not None and not 0.001 <= target <= 3600:
        raise ValueError(
            f"target={target} is not allowed: a 95th percentile is kept below 0.001 to 3600 seconds (--target-p95 is "
            "in milliseconds)."
        )
    if not 0 <= max_score_drop <= 1:
        raise ValueError(
            f"max_score_drop={max_score_drop} is not allowed: scores end at 1, and five points of them are 0.05."
        )


def check_settings(settings: ServiceSettings) -> None:
    """Refuses with a ValueError adapters that tag tokens, and a target that cannot be kept by moving along a stored
    curve. What lies in a repository is checked when it is there, by the replicas."""
    check_goal(settings.target, settings.max_score_drop)
    tasks, facts = _facts(settings)
    check_texts([task for task, own in facts.items() if _reads_tokens(own)])
    if settings.target is None:
        return
    if tasks != [MAIN]:
        raise ValueError(ONE_ADAPTER)
    if not facts:
        return
    own = EarlyExitConfig.of(facts[MAIN].get("early_exit"))
    controller = LatencyController.for_adapter(own, settings.target, settings.max_score_drop)
    if settings.onnx:
        from badge_peft.serving.onnx_engine import FixedRule

        rule = FixedRule.of(facts[MAIN], facts[MAIN]["num_blocks"])
        for point in controller.points:
            rule.inputs(point.config)


def _facts(settings: ServiceSettings) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The tasks (or `default`), and what is said of each by files that are on this machine."""
    if settings.onnx:
        whole = _read(Path(settings.adapter, "early_exit.json"))
        found = {task: {**whole, **own} for task, own in whole.get("tasks", {MAIN: {}}).items()}
        return list(found), found
    given = settings.adapter
    places = given if isinstance(given, Mapping) else find_tasks(given) or {MAIN: given}
    files = {task: Path(place, "adapter_config.json") for task, place in places.items()}
    return list(places), {task: _read(file) for task, file in files.items() if file.exists()}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _reads_tokens(facts: Mapping[str, Any]) -> bool:
    return facts.get("task_type") == "TOKEN_CLS" or "special_tokens_mask" in facts.get("inputs", ())
