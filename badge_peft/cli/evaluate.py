"""`badge-peft evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from badge_peft.cli import options as shared
from badge_peft.workflows.settings import Columns


def evaluate(
    adapter: shared.Adapter,
    data: shared.Data,
    /,
    *,
    columns: shared.Columns = Columns(),
    metric: shared.Metric = None,
    batch_size: shared.BatchSize = 32,
    latency: Annotated[
        int,
        Parameter(
            validator=shared.AT_LEAST_0, help="Also time this many rows, one by one, with early exits and without."
        ),
    ] = 0,
    json_file: shared.JsonFile = None,
    save_logits: Annotated[
        Path | None,
        Parameter(help="Write the logits of all exits to this safetensors file, for sweep and calibrate."),
    ] = None,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Measure an adapter: how good each exit is, and what its policy costs and saves.

    With labels the scores are against them; without, against full depth's answers.

    Several processes, started with accelerate launch or torchrun, share the rows among them.
    """
    from badge_peft.utils.distributed import is_main
    from badge_peft.workflows.adapter_dir import open_adapter
    from badge_peft.workflows.data import read_examples
    from badge_peft.workflows.evaluate import evaluate_adapter
    from badge_peft.workflows.report import latency_line, measured_table, summary

    opened = open_adapter(adapter, base_model, device)
    rows = read_examples(data, columns, recorded=opened.columns)
    shared.prepare_folder(json_file, save_logits)
    report, exit_logits = evaluate_adapter(opened, rows, metric, batch_size, latency)
    if not is_main():
        return
    report = {"adapter": adapter, "data": data, **report}
    print(f"\n{measured_table(report)}\n\n{summary(report)}")
    if "latency" in report:
        print(latency_line(report["latency"]))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if save_logits is not None:
        exit_logits.save(save_logits)
