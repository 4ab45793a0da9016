"""The command that answers over HTTP: `serve`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt
from cyclopts.validators import Number

from badge_peft.cli import options as shared


def serve(
    adapters: Annotated[
        list[str],
        Parameter(help="An adapter, or a bundle of many; or many, each as NAME=ADAPTER, which answer in one pass."),
    ],
    /,
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(validator=Number(gte=1, lte=65535))] = 8000,
    replicas: PositiveInt = 1,
    threads: PositiveInt = 1,
    batch_size: PositiveInt = 32,
    batch_wait: NonNegativeFloat = 2.0,
    target_p95: PositiveFloat | None = None,
    max_score_drop: NonNegativeFloat = 0.01,
    shadow_share: Annotated[float, Parameter(validator=Number(gte=0, lte=1))] = 0.01,
    on_drift: str = "alarm",
    max_rows: PositiveInt = 1000,
    max_characters: PositiveInt = 100_000,
    max_body_bytes: PositiveInt = 4 * 2**20,
    max_waiting: PositiveInt = 2000,
    address: str | None = None,
    base_model: shared.BaseModel = None,
) -> None:
    """Answer texts over HTTP, in batches, on any number of replicas. Needs the extra serve.

    POST /predict {"inputs": ["a text"]}, for models that rank POST /rerank {"query": ..., "texts": [...]}, GET
    /healthz, /info, /metrics and /docs; PUT /policy with the bearer token that is in BADGE_PEFT_TOKEN, if one is. INT
    and TERM finish what was accepted.

    Args:
        host: Address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in.
        replicas: Copies of the model, each in a process of its own.
        threads: Of torch, in each replica.
        batch_size: Requests in a batch, and texts in a pass.
        batch_wait: Milliseconds that a request waits for others to share its batch.
        target_p95: Milliseconds: move along the calibrated curve to keep the 95th percentile of the latency below.
        max_score_drop: With --target-p95: never go to a setting that scores so much less than full depth.
        shadow_share: Share of the texts that also run at full depth in idle time, to notice drift.
        on_drift: After an alarm: alarm says it in the log and in /metrics, careful also goes to full depth.
        max_rows: Texts in one request; more are refused.
        max_characters: Of one text.
        max_body_bytes: Of one request.
        max_waiting: Texts that a replica may have accepted and not answered; beyond it clients get 429.
        address: Of a Ray cluster to run on. Default: this machine alone.
    """
    from badge_peft.utils.checks import check_choice
    from badge_peft.utils.extras import require
    from badge_peft.workflows.tasks import tasks_of

    check_choice("on_drift", on_drift, ("alarm", "careful"))
    require("serve", "ray", "pydantic", "fastapi", "prometheus_client")
    from badge_peft.workflows.adapter_dir import check_adapter

    adapter = adapters[0] if len(adapters) == 1 and "=" not in adapters[0] else tasks_of(adapters, None)
    bundle = tasks_of([], adapter) if isinstance(adapter, str) else adapter
    for place in [adapters[0]] if bundle is None else bundle.values():
        check_adapter(place)
    from badge_peft.serving.requests import Limits
    from badge_peft.serving.run import run_service
    from badge_peft.serving.settings import ServiceSettings

    settings = ServiceSettings(
        adapter,
        base_model,
        threads,
        replicas,
        batch_size,
        batch_wait / 1000,
        None if target_p95 is None else target_p95 / 1000,
        max_score_drop,
        shadow_share,
        on_drift == "careful",
        limits=Limits(max_rows, max_characters, max_body_bytes, max_waiting),
    )
    run_service(settings, host, port, address, lambda: print(f"serving at http://{host}:{port}", flush=True))
