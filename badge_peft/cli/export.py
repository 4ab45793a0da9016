"""`badge-peft export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from badge_peft.cli import options as shared
from badge_peft.workflows.settings import Columns, PolicyOverrides


def export(
    adapter: shared.Adapter,
    dir: Annotated[Path, Parameter(help="Folder to write; it is made.")],
    /,
    *,
    data: Annotated[
        str | None, Parameter(help=f"Compare the file with the PyTorch model on these rows. {shared.DATA}")
    ] = None,
    int8: Annotated[bool, Parameter(help="Quantize the blocks: several times smaller and faster on a CPU.")] = False,
    compact: Annotated[
        bool,
        Parameter(
            negative="--no-compact", help="Take rows that have answered out of the batch, or let them go along."
        ),
    ] = True,
    overrides: shared.Overrides = PolicyOverrides(),
    columns: shared.Columns = Columns(),
    json_file: shared.JsonFile = None,
    base_model: shared.BaseModel = None,
) -> None:
    """Write an adapter with its model as one ONNX file that computes no block behind the exit.

    Threshold and patience stay inputs of the graph, so a service changes its speed from call to call. The folder also
    gets the tokenizer, the configs and a card. Needs the extra onnx: pip install 'badge-peft[onnx]'.
    """
    from badge_peft.export import export_onnx
    from badge_peft.utils.extras import require_onnx_exporter
    from badge_peft.workflows.adapter_dir import open_adapter
    from badge_peft.workflows.data import read_examples
    from badge_peft.workflows.evaluate import encode_for
    from badge_peft.workflows.predict import resolve_policy_config

    require_onnx_exporter()
    opened = open_adapter(adapter, base_model, "cpu")
    config = resolve_policy_config(opened, **vars(overrides))
    examples = None if data is None else encode_for(opened, read_examples(data, columns, recorded=opened.columns))
    shared.prepare_folder(json_file)
    report = export_onnx(
        opened.model,
        dir,
        tokenizer=opened.tokenizer,
        early_exit_config=config,
        int8=int8,
        compact=compact,
        examples=examples,
        progress=True,
    )
    print(f"{dir / 'model.onnx'}: {report.size_bytes / 1e6:.1f} MB, exits at {report.exit_layers}")
    if report.changes is not None:
        found = report.changes
        print(
            f"on {found.rows} rows, against PyTorch: same answer {found.same_answer:.1%}, same exit "
            f"{found.same_exit:.1%}, mean exit {found.mean_exit:.2f} against {found.mean_exit_before:.2f}"
        )
        if found.score is not None and found.score_before is not None:
            print(f"score {found.score:.4f} against {found.score_before:.4f}")
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
