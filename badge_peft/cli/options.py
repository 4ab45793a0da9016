"""Options that several commands share: single ones, and the groups of `badge_peft.workflows.settings` as panels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from badge_peft.workflows import settings

DATA = (
    "A csv, tsv, json, jsonl, parquet or txt file (one text per line), a folder of such files, or a data set of the "
    "Hub."
)
_DATA_PANEL = Group("Data", sort_key=2)
_STOP_PANEL = Group("How to stop", sort_key=5)
AT_LEAST_1 = Number(gte=1)
AT_LEAST_0 = Number(gte=0)

Adapter = Annotated[str, Parameter(help="Folder of the adapter, or a repository of the Hub.")]
Data = Annotated[str, Parameter(help=DATA)]
BaseModel = Annotated[
    str | None, Parameter(help="Base model, where it is not where the adapter says: a folder or a repository.")
]
Device = Annotated[str | None, Parameter(help="cpu, cuda, ... Default: a GPU where there is one.")]
BatchSize = Annotated[int, Parameter(validator=AT_LEAST_1, help="Batch size: texts per pass.")]
Metric = Annotated[
    str | None,
    Parameter(
        help="accuracy, f1, acc_and_f1, macro_f1, matthews; for regression pearson, spearman, neg_mse. Default: "
        "accuracy, for regression pearson."
    ),
]
JsonFile = Annotated[Path | None, Parameter("--json", help="Also write the result to this JSON file.")]

TextColumns = Annotated[settings.TextColumns, Parameter("*", group=_DATA_PANEL)]
Columns = Annotated[settings.Columns, Parameter("*", group=_DATA_PANEL)]
Goal = Annotated[settings.Goal, Parameter("*", group=_STOP_PANEL)]
Overrides = Annotated[settings.PolicyOverrides, Parameter("*", group=_STOP_PANEL)]

# the groups inside `TrainSettings`, whose fields' annotations stay free of this library
for panel, group in (
    (_DATA_PANEL, settings.TrainColumns),
    (Group("Exits", sort_key=3), settings.ExitOptions),
    (Group("Training", sort_key=4), settings.TrainingOptions),
    (_STOP_PANEL, settings.Goal),
):
    Parameter("*", group=panel)(group)


def prepare_folder(*files: Path | None) -> None:
    """Makes the folders that files are to be written to, so that nothing fails at the end."""
    for file in files:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
