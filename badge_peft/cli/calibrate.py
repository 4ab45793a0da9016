"""`badge-peft calibrate`."""

from __future__ import annotations

from typing import Annotated

import typer

from badge_peft.cli import options as shared
from badge_peft.cli.errors import told_plainly

_DATA = f"Texts to choose on. Default: the exit logits that train left in the folder. {shared.DATA_HELP}"


def calibrate(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of the adapter.")],
    data: Annotated[str | None, typer.Argument(metavar="DATA", help=_DATA)] = None,
    policy: shared.Policy = "auto",
    max_score_drop: shared.MaxScoreDrop = None,
    target_speedup: shared.TargetSpeedup = None,
    confidence: shared.Confidence = None,
    metric: shared.MetricOption = None,
    text_column: shared.TextColumn = None,
    text_pair_column: shared.TextPairColumn = None,
    label_column: shared.LabelColumn = None,
    unlabelled: shared.Unlabelled = False,
    split: shared.Split = None,
    dataset_config: shared.DatasetConfig = None,
    batch_size: shared.BatchSize = 32,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Choose how an adapter stops, and write the choice into its adapter_config.json.

    Nothing else in the folder changes but the numbers of its card, and nothing is
    trained: an adapter can be calibrated again, in seconds, whenever another speed
    is wanted.
    """
    with told_plainly():
        from badge_peft.workflows.choose import choose_rule
        from badge_peft.workflows.measure import summary

        columns = {
            "text_column": text_column,
            "text_pair_column": text_pair_column,
            "label_column": label_column,
            "unlabelled": unlabelled,
            "split": split,
            "dataset_config": dataset_config,
        }
        goal = {"max_score_drop": max_score_drop, "target_speedup": target_speedup, "confidence": confidence}
        report = choose_rule(adapter, data, columns, policy, goal, metric, base_model, batch_size, device)
        typer.echo(f"{summary(report)}\nwritten to {report['written']}")
        for note in report["notes"]:
            typer.secho(f"note: {note}", err=True, fg=typer.colors.YELLOW)
