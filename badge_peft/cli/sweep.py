"""`badge-peft sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from badge_peft.cli import options as shared
from badge_peft.cli.errors import told_plainly

_SOURCE = "An adapter's folder (or repository), or a file of exit logits."
_DATA = f"Texts to run through the adapter. Default: the exit logits that train left in its folder. {shared.DATA_HELP}"


def sweep(
    source: Annotated[str, typer.Argument(metavar="ADAPTER_OR_LOGITS", help=_SOURCE)],
    data: Annotated[str | None, typer.Argument(metavar="DATA", help=_DATA)] = None,
    policies: Annotated[
        str | None,
        typer.Option(help="Rules to compare, with commas. Default: divergence,patience,entropy,max_prob."),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Settings of each rule.")] = 20,
    metric: shared.MetricOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file (png, svg or pdf).")] = None,
    json_file: shared.JsonFile = None,
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
    """Show what every setting of a rule would cost and save, without choosing one.

    The fixed depths, where every text stops at the same block, are always shown
    beside the rules: a rule is worth having where it beats them.
    """
    with told_plainly():
        from badge_peft import evaluation
        from badge_peft.early_exit.config import POLICY_NAMES
        from badge_peft.utils.checks import one_of
        from badge_peft.workflows.evaluate import logits_of
        from badge_peft.workflows.measure import default_metric, describe, show, with_labels
        from badge_peft.workflows.tables import text_table

        names = None if policies is None else [name.strip() for name in policies.split(",") if name.strip()]
        for name in names or []:
            one_of("policies", name, POLICY_NAMES)
        columns = {
            "text_column": text_column,
            "text_pair_column": text_pair_column,
            "label_column": label_column,
            "unlabelled": unlabelled,
            "split": split,
            "dataset_config": dataset_config,
        }
        exit_logits = logits_of(source, data, columns, base_model, batch_size, device)
        against = "" if exit_logits.labels is not None else " against full depth"
        exit_logits = with_labels(exit_logits)
        for path in (plot, json_file):
            shared.prepare_folder(path)
        found = evaluation.sweep(exit_logits, names, points, metric or default_metric(exit_logits.problem_type))
        lines = [
            [
                point.name,
                describe(point.config.to_dict()),
                f"{point.mean_exit:.2f}",
                f"{point.layer_speedup:.1%}",
                show(point.score, found.metric),
            ]
            for curve in found.names
            for point in found.curve(curve)
        ]
        typer.echo(text_table(["rule", "setting", "mean exit", "blocks saved", f"{found.metric}{against}"], lines))
        if json_file is not None:
            found.save(json_file)
        if plot is not None:
            from badge_peft.evaluation.plots import plot_tradeoff

            plot_tradeoff(found, plot)
