"""`badge-peft bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from badge_peft.cli import options as shared
from badge_peft.cli.errors import told_plainly


def bench(
    adapter: shared.AdapterArgument,
    data: Annotated[str, typer.Argument(metavar="DATA", help=shared.DATA_HELP)],
    text_column: shared.TextColumn = None,
    text_pair_column: shared.TextPairColumn = None,
    label_column: shared.LabelColumn = None,
    unlabelled: shared.Unlabelled = False,
    split: shared.Split = None,
    dataset_config: shared.DatasetConfig = None,
    metric: shared.MetricOption = None,
    rows: Annotated[int, typer.Option(min=1, help="How many texts to time: the first of the data.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once; times are then those of a batch.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch and of each ONNX Runtime session. Default: torch's own number.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx/--no-onnx", help="Also export to ONNX and time ONNX Runtime, fp32 and int8.")
    ] = True,
    policy: shared.OwnPolicy = None,
    threshold: shared.OwnThreshold = None,
    patience: shared.OwnPatience = None,
    depth: shared.OwnDepth = None,
    json_file: shared.JsonFile = None,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Time an adapter on texts of yours beside what could be run instead.

    Stock PyTorch, early exits in PyTorch, ONNX Runtime at full depth, early exits in ONNX Runtime, and both in int8,
    in turn: milliseconds, texts per second, mean exit, and the score where the data has labels.
    """
    with told_plainly():
        from badge_peft.export.needs import need_onnx
        from badge_peft.workflows import bench_adapter, exit_rule, open_adapter, read_rows
        from badge_peft.workflows.judge import bench_summary, bench_table

        if onnx:
            need_onnx()
        opened = open_adapter(adapter, base_model, device)
        rule = exit_rule(opened, policy=policy, threshold=threshold, patience=patience, depth=depth)
        found = read_rows(
            data,
            text_column,
            text_pair_column,
            label_column,
            unlabelled,
            split,
            dataset_config,
            usual=opened.columns,
        )
        shared.prepare_folder(json_file)
        report = bench_adapter(opened, found, rule, rows, batch_size, threads, onnx, metric)
        report = {"adapter": adapter, "data": data, "split": found.split, **report}
        typer.echo(f"\n{bench_table(report)}\n\n{bench_summary(report)}")
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
