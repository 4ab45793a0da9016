"""What a service is told when it starts; what would keep every replica from starting is said before anything does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from badge_peft.bundle import find_tasks
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.serving.controller import LatencyController

ONE_ADAPTER = "a target is for a service of one adapter: of many tasks, set each one's threshold."
MAIN = "default"  # what the one adapter of a service without tasks is called
TOKEN = "BADGE_PEFT_TOKEN"  # an environment variable: who has what is in it may change the policy


@dataclass(frozen=True)
class Limits:
    """How much one request, and all that wait, may hold.

    Args:
        rows: Texts (or pairs, or candidates) of one request.
        characters: Of one text, or of the two of a pair.
        body_bytes: Of one request.
        waiting_rows: Rows that a replica has accepted and not answered; beyond it requests are refused with 429.
        body_seconds: Within which a body has to be there, or the request is refused with 408.
    """

    rows: int = 1000
    characters: int = 100_000
    body_bytes: int = 4 * 2**20
    waiting_rows: int = 2000
    body_seconds: float = 30.0

    @property
    def all_bytes(self) -> int:
        """Of the bodies that are in a replica at a time, read or not yet; beyond it the large ones get a 429."""
        return 16 * self.body_bytes


@dataclass(frozen=True)
class ServiceSettings:
    """What `badge-peft serve` was told.

    Args:
        adapter: A folder or repository, or a dict from tasks to such.
        base_model: As for `load_pretrained`.
        onnx: Whether `adapter` is a folder that `export_onnx` or `export_tasks_onnx` wrote.
        threads: Of torch or ONNX Runtime, in each replica.
        replicas: How many; with `autoscaling` those at the start.
        autoscaling: Ray Serve's `AutoscalingConfig` as a dict; None: the number stays.
        batch_size: Rows in a pass.
        batch_wait: Seconds that a request waits for others where no pass runs.
        target: Seconds that the p95 latency is kept below; None: off.
        max_score_drop: The floor of the controller.
        shadow_share: Share of the rows that also run at full depth.
        careful: Go to full depth after an alarm of drift.
        report_every: Seconds between two reports of a replica.
        limits: Of requests.
        governor: Name of the actor that all replicas report to; of this service alone.
    """

    adapter: Any
    base_model: str | None = None
    onnx: bool = False
    threads: int = 1
    replicas: int = 1
    autoscaling: dict[str, Any] | None = None
    batch_size: int = 32
    batch_wait: float = 0.0
    target: float | None = None
    max_score_drop: float = 0.01
    shadow_share: float = 0.01
    careful: bool = False
    report_every: float = 0.1
    limits: Limits = field(default_factory=Limits)
    governor: str = field(default_factory=lambda: f"badge-peft-governor-{uuid4().hex}")


def check_texts(tagging: Sequence[str]) -> None:
    """Refuses tasks whose answers are tags of tokens, with a ValueError."""
    if tagging:
        who = "the adapter" if list(tagging) == [MAIN] else ", ".join(tagging)
        raise ValueError(
            f"{who}: the answers are tags of tokens, and a service answers whole texts. Leave it out, and tag with "
            "badge-peft predict or badge_peft.pipeline."
        )


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
        from badge_peft.serving.fixed_policy import FixedPolicy

        policy = FixedPolicy.of(facts[MAIN], facts[MAIN]["num_blocks"])
        for point in controller.points:
            policy.inputs(point.config)


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
