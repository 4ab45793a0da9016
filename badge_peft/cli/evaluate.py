"""`badge-peft evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from badge_peft.cli import options as shared
from badge_peft.cli.errors import told_plainly


def evaluate(
    adapter: shared.AdapterArgument,
    data: Annotated[str, typer.Argument(metavar="DATA", help=shared.DATA_HELP)],
    text_column: shared.TextColumn = None,
    text_pair_column: shared.TextPairColumn = None,
    label_column: shared.LabelColumn = None,
    unlabelled: shared.Unlabelled = False,
    split: shared.Split = None,
    dataset_config: shared.DatasetConfig = None,
    metric: shared.MetricOption = None,
    batch_size: shared.BatchSize = 32,
    latency: Annotated[
        int, typer.Option(min=0, help="Also time this many rows, one by one, with early exits and without.")
    ] = 0,
    json_file: shared.JsonFile = None,
    save_logits: Annotated[
        Path | None,
        typer.Option(help="Write the logits of all exits to this safetensors file, for sweep and calibrate."),
    ] = None,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Measure an adapter: how good each exit is, and what its exit rule costs and saves.

    With labels the scores are against them; without, against full depth's answers.

    Several processes, started with accelerate launch or torchrun, share the rows
    among them.
    """
    with told_plainly():
        from badge_peft.utils.distributed import is_main
        from badge_peft.workflows import evaluate_adapter, open_adapter, read_rows
        from badge_peft.workflows.evaluate import latency_line
        from badge_peft.workflows.measure import measured_table, summary

        opened = open_adapter(adapter, base_model, device)
        rows = read_rows(
            data,
            text_column,
            text_pair_column,
            label_column,
            unlabelled,
            split,
            dataset_config,
            usual=opened.columns,
        )
        for path in (json_file, save_logits):
            shared.prepare_folder(path)
        report, exit_logits = evaluate_adapter(opened, rows, metric, batch_size, latency)
        if not is_main():
            return
        report = {"adapter": adapter, "data": data, **report}
        typer.echo(f"\n{measured_table(report)}\n\n{summary(report)}")
        if "latency" in report:
            typer.echo(latency_line(report["latency"]))
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if save_logits is not None:
            exit_logits.save(save_logits)
