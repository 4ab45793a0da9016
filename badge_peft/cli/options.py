"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DATA_HELP = (
    "A csv, tsv, json, jsonl, parquet or txt file (one text per line), a folder of such files, or a data set of the "
    "Hub."
)
_METRICS = "accuracy, f1, acc_and_f1, macro_f1, matthews; for regression pearson, spearman, neg_mse"
_RULES = (
    "divergence, patience, entropy, max_prob, learned, confident_patience, agreement, fixed_depth, or never (full "
    "depth)"
)
_DATA_PANEL = "Data"

AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Folder of the adapter, or a repository of the Hub.")
]
TextColumn = Annotated[
    str | None,
    typer.Option(help="Column of the texts. Default: found by its name.", rich_help_panel=_DATA_PANEL),
]
TextPairColumn = Annotated[
    str | None,
    typer.Option(help="Column of the second texts, where each row is a pair.", rich_help_panel=_DATA_PANEL),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the labels. Default: found by its name (label, category, ...); there may be none.",
        rich_help_panel=_DATA_PANEL,
    ),
]
Unlabelled = Annotated[
    bool, typer.Option("--unlabelled", help="Take no notice of labels.", rich_help_panel=_DATA_PANEL)
]
Split = Annotated[
    str | None, typer.Option(help="Split of the data set, where it has several.", rich_help_panel=_DATA_PANEL)
]
DatasetConfig = Annotated[
    str | None, typer.Option(help="Configuration of a data set of the Hub.", rich_help_panel=_DATA_PANEL)
]
BaseModel = Annotated[
    str | None, typer.Option(help="Base model, where it is not where the adapter says: a folder or a repository.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU where there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts at once.")]
MetricOption = Annotated[str | None, typer.Option(help=f"{_METRICS}. Default: accuracy, for regression pearson.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
MaxScoreDrop = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="The most that stopping early may cost, in units of the score: 0.01 is a point of accuracy. The fastest "
        "rule within it is taken. Default: 0.01.",
        rich_help_panel="How to stop",
    ),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="In place of a largest drop: the share of blocks to save, 0.5 for half. The best score at it is taken.",
        rich_help_panel="How to stop",
    ),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        help="Such as 0.95: choose so that with this probability the drop holds on new data of the same kind, too. "
        "Takes more rows.",
        rich_help_panel="How to stop",
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        help=f"Rule to choose a setting of: auto (search them all), {_RULES}.", rich_help_panel="How to stop"
    ),
]
OwnPolicy = Annotated[
    str | None, typer.Option(help=f"Rule in place of the adapter's own: {_RULES}.", rich_help_panel="How to stop")
]
OwnThreshold = Annotated[
    float | None,
    typer.Option(help="Of the rule, in place of the adapter's.", rich_help_panel="How to stop"),
]
OwnPatience = Annotated[
    int | None,
    typer.Option(min=1, help="How many exits must agree, in place of the adapter's.", rich_help_panel="How to stop"),
]
OwnDepth = Annotated[
    int | None,
    typer.Option(min=0, help="The block that answers, for fixed_depth.", rich_help_panel="How to stop"),
]


def prepare_folder(path: Path | None) -> None:
    """Makes the folder that a file is to be written to, so that nothing fails at the end."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
