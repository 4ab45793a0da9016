"""What a service is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

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
