"""`badge-peft bench`."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from badge_peft.cli import options as shared
from badge_peft.workflows.settings import Columns, PolicyOverrides


def bench(
    adapter: shared.Adapter,
    data: shared.Data,
    /,
    *,
    columns: shared.Columns = Columns(),
    metric: shared.Metric = None,
    rows: Annotated[
        int, Parameter(validator=shared.AT_LEAST_1, help="How many texts to time: the first of the data.")
    ] = 200,
    batch_size: Annotated[
        int,
        Parameter(validator=shared.AT_LEAST_1, help="Batch size: texts per call; times are then those of a batch."),
    ] = 1,
    threads: Annotated[
        int | None,
        Parameter(
            validator=shared.AT_LEAST_1,
            help="Of torch and of each ONNX Runtime session. Default: torch's own number.",
        ),
    ] = None,
    onnx: Annotated[
        bool,
        Parameter(negative="--no-onnx", help="Also export to ONNX and time ONNX Runtime, fp32 and int8."),
    ] = True,
    overrides: shared.Overrides = PolicyOverrides(),
    json_file: shared.JsonFile = None,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Time an adapter on texts of yours beside what could be run instead.

    Stock PyTorch, early exits in PyTorch, ONNX Runtime at full depth, early exits in ONNX Runtime, and both in int8,
    in turn: milliseconds, texts per second, mean exit, and the score where the data has labels.
    """
    from badge_peft.utils.extras import require_onnx_exporter
    from badge_peft.workflows.adapter_dir import open_adapter
    from badge_peft.workflows.bench import bench_adapter
    from badge_peft.workflows.data import read_examples
    from badge_peft.workflows.predict import resolve_policy_config
    from badge_peft.workflows.results import bench_summary, bench_table

    if onnx:
        require_onnx_exporter()
    opened = open_adapter(adapter, base_model, device)
    config = resolve_policy_config(opened, **vars(overrides))
    examples = read_examples(data, columns, recorded=opened.columns)
    shared.prepare_folder(json_file)
    report = bench_adapter(opened, examples, config, rows, batch_size, threads, onnx, metric)
    report = {"adapter": adapter, "data": data, "split": examples.split, **report}
    print(f"\n{bench_table(report)}\n\n{bench_summary(report)}")
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
