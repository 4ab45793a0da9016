"""The command that answers over HTTP: `serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
    onnx: bool = False,
    replicas: PositiveInt = 1,
    autoscaling: str | None = None,
    threads: PositiveInt = 1,
    batch_size: PositiveInt = 32,
    batch_wait: NonNegativeFloat = 0.0,
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
    """Serve an adapter over HTTP, in batches, on any number of replicas. Needs the extra serve.

    POST /predict {"inputs": ["a text"]}, for models that rank POST /rerank {"query": ..., "texts": [...]}, GET
    /healthz, /info, /metrics and /docs; PUT /policy with the bearer token that is in BADGE_PEFT_TOKEN, if one is. INT
    and TERM finish what was accepted.

    Args:
        host: Address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in.
        onnx: ADAPTER is a folder that badge-peft export wrote, of one task or of many, for ONNX Runtime.
        replicas: Copies of the model, each in a process of its own.
        autoscaling: As many replicas as the load asks for: Ray Serve's autoscaling_config as JSON, such as
            '{"min_replicas": 1, "max_replicas": 4}'. A replica's target_ongoing_requests is --batch-size, unless it
            says so.
        threads: Of torch or ONNX Runtime, in each replica.
        batch_size: Texts in a pass. Requests that come while one runs share the next.
        batch_wait: Milliseconds that a request also waits for others where none runs.
        target_p95: Milliseconds: move along the calibrated curve to keep the 95th percentile of the latency below.
        max_score_drop: With --target-p95: never go to a setting that scores so much less than full depth.
        shadow_share: Share of the texts that also run at full depth, in a twentieth of the time at most, to notice
            drift.
        on_drift: After an alarm: alarm says it in the log and in /metrics, careful also goes to full depth.
        max_rows: Texts in one request; more are refused.
        max_characters: Of one text.
        max_body_bytes: Of one request.
        max_waiting: Texts that a replica may have accepted and not answered; beyond it clients get 429.
        address: Of a Ray cluster to run on. Default: this machine alone.
    """
    from badge_peft.utils.checks import check_choice
    from badge_peft.utils.extras import ask_for_token, require

    check_choice("on_drift", on_drift, ("alarm", "careful"))
    scaling = _autoscaling(autoscaling, replicas)
    require("serve", "ray", "pydantic", "fastapi", "prometheus_client")
    adapter = _file(adapters, base_model) if onnx else _adapter(adapters)
    ask_for_token(address)
    from badge_peft.serving.run import run_service
    from badge_peft.serving.settings import Limits, ServiceSettings

    settings = ServiceSettings(
        adapter,
        base_model,
        onnx,
        threads,
        replicas,
        scaling,
        batch_size,
        batch_wait / 1000,
        None if target_p95 is None else target_p95 / 1000,
        max_score_drop,
        shadow_share,
        on_drift == "careful",
        limits=Limits(max_rows, max_characters, max_body_bytes, max_waiting),
    )
    print("starting, which can take a minute", flush=True)
    run_service(settings, host, port, address, lambda: print(f"serving at http://{host}:{port}", flush=True))


def _adapter(adapters: list[str]) -> Any:
    """A folder or repository, or a dict of them by task, each checked."""
    from badge_peft.workflows.adapter_dir import check_adapter, is_named, tasks_of

    for place in adapters:
        if (Path(place) / "early_exit.json").exists():
            raise ValueError(f"{place} is what badge-peft export wrote: serve it with --onnx.")
    adapter = adapters[0] if len(adapters) == 1 and not is_named(adapters[0]) else tasks_of(adapters, None)
    bundle = tasks_of([], adapter) if isinstance(adapter, str) else adapter
    for place in [adapters[0]] if bundle is None else bundle.values():
        check_adapter(place)
    return adapter


def _file(adapters: list[str], base_model: str | None) -> str:
    """The folder of an export, checked."""
    from badge_peft.export.folder import holds_tasks
    from badge_peft.utils.extras import require
    from badge_peft.workflows.adapter_dir import is_named

    if len(adapters) > 1 or is_named(adapters[0]):
        raise ValueError(
            "--onnx serves one folder: write many tasks as one with badge-peft export --task NAME=ADAPTER."
        )
    if base_model is not None:
        raise ValueError("--base-model is not allowed with --onnx: the file has the base model in it.")
    require("onnx", "onnxruntime")
    holds_tasks(adapters[0])
    return adapters[0]


def _autoscaling(given: str | None, replicas: int) -> dict[str, Any] | None:
    """The JSON of `--autoscaling`."""
    if given is None:
        return None
    if replicas != 1:
        raise ValueError(f"--replicas {replicas} is not allowed with --autoscaling: its min_replicas says it.")
    try:
        found = json.loads(given)
    except ValueError as error:
        raise ValueError(f"--autoscaling {given} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f'--autoscaling {given} is not allowed: give an object, as in {{"max_replicas": 4}}.')
    return found
