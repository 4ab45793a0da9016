"""`badge-peft export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from badge_peft.cli import options as shared
from badge_peft.cli.errors import told_plainly


def export(
    adapter: shared.AdapterArgument,
    output_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; it is made.")],
    data: Annotated[
        str | None,
        typer.Option(help=f"Compare the file with the PyTorch model on these rows. {shared.DATA_HELP}"),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the blocks: several times smaller and faster on a CPU.")
    ] = False,
    compact: Annotated[
        bool, typer.Option(help="Take rows that have answered out of the batch, or let them go along.")
    ] = True,
    policy: shared.OwnPolicy = None,
    threshold: shared.OwnThreshold = None,
    patience: shared.OwnPatience = None,
    depth: shared.OwnDepth = None,
    text_column: shared.TextColumn = None,
    text_pair_column: shared.TextPairColumn = None,
    label_column: shared.LabelColumn = None,
    json_file: shared.JsonFile = None,
    base_model: shared.BaseModel = None,
) -> None:
    """Write an adapter with its model as one ONNX file that computes no block behind the exit.

    Threshold and patience stay inputs of the graph, so a service changes its speed from call to call.
    The folder also gets the tokenizer, the configs and a card. Needs the extra `onnx`.
    """
    with told_plainly():
        from badge_peft.export import export_onnx
        from badge_peft.export.needs import need_onnx
        from badge_peft.workflows import exit_rule, open_adapter, read_rows
        from badge_peft.workflows.evaluate import encode_for

        need_onnx()
        opened = open_adapter(adapter, base_model, "cpu")
        rule = exit_rule(opened, policy=policy, threshold=threshold, patience=patience, depth=depth)
        examples = None
        if data is not None:
            rows = read_rows(data, text_column, text_pair_column, label_column, usual=opened.columns)
            examples = encode_for(opened, rows)
        shared.prepare_folder(json_file)
        report = export_onnx(
            opened.model,
            output_dir,
            tokenizer=opened.tokenizer,
            early_exit_config=rule,
            int8=int8,
            compact=compact,
            examples=examples,
            progress=True,
        )
        typer.echo(f"{output_dir / 'model.onnx'}: {report.size_bytes / 1e6:.1f} MB, exits at {report.exit_layers}")
        if report.changes is not None:
            found = report.changes
            typer.echo(
                f"on {found.rows} rows, against PyTorch: same answer {found.same_answer:.1%}, same exit "
                f"{found.same_exit:.1%}, mean exit {found.mean_exit:.2f} against {found.mean_exit_before:.2f}"
            )
            if found.score is not None and found.score_before is not None:
                typer.echo(f"score {found.score:.4f} against {found.score_before:.4f}")
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
