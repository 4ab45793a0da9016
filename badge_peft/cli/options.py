"""Options that several commands share: single ones, and the groups of settings.py as panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.types import PositiveInt

from badge_peft.utils.files import write_json
from badge_peft.workflows import settings

DATA = (
    "A csv, tsv, json, jsonl, parquet or txt file (one text per line), a folder of such files, or a data set of the "
    "Hub."
)

Adapter = Annotated[str, Parameter(help="Folder of the adapter, or a repository of the Hub.")]
Data = Annotated[str, Parameter(help=DATA)]
AdapterOrTasks = Annotated[
    str | None,
    Parameter(help="Folder of the adapter, or a repository of the Hub; or a bundle of many. Left out with --task."),
]
Task = Annotated[
    list[str] | None,
    Parameter(
        "--task",
        negative="",
        help="NAME=ADAPTER, once for each task: many adapters of one base model, which answer every text in one pass.",
    ),
]
OtherData = Annotated[
    str | None,
    Parameter(
        help=f"Texts to run through the adapter. Default: the exit logits that train left in its folder. {DATA}"
    ),
]
BaseModel = Annotated[
    str | None, Parameter(help="Base model, where it is not where the adapter says: a folder or a repository.")
]
Device = Annotated[str | None, Parameter(help="cpu, cuda, ... Default: a GPU where there is one.")]
BatchSize = Annotated[PositiveInt, Parameter(help="Batch size: texts per pass.")]
Metric = Annotated[
    str | None,
    Parameter(
        help="accuracy, f1, acc_and_f1, macro_f1, matthews; for regression pearson, spearman, "
        "pearson_and_spearman, neg_mse; for tags of entities entity_f1. Default: accuracy, for regression pearson, "
        "for tags of entities entity_f1."
    ),
]
JsonFile = Annotated[Path | None, Parameter("--json", help="Also write the result to this JSON file.")]

settings.ExitOptions.__annotations__["keep_head"] = Annotated[bool | None, Parameter(negative="--no-keep-head")]
settings.SearchOptions.__annotations__["search_for"] = Annotated[str, Parameter("--for")]  # no name in Python

# the groups of options, whose annotations stay free of this library: each class has its panel
for panel, groups in (
    (Group("Options", sort_key=1), (settings.TrainSettings, settings.DemoSettings)),
    (Group("Data", sort_key=2), (settings.TextColumns, settings.Columns, settings.TrainColumns)),
    (Group("Exits", sort_key=3), (settings.ExitOptions,)),
    (Group("Training", sort_key=4), (settings.TrainingOptions,)),
    (Group("Search", sort_key=5), (settings.SearchOptions,)),
    (Group("How to stop", sort_key=6), (settings.Goal, settings.PolicyOverrides)),
):
    for group in groups:
        Parameter("*", group=panel)(group)


def adapters_and(
    names: Sequence[str], tasks: list[str] | None, *given: str | None, needed: bool = True
) -> tuple[dict[Any, str], list[Any]]:
    """The adapters by their tasks (None: one alone), and the arguments behind, called `names`, which come first where
    the adapters are named with `--task`."""
    from badge_peft.workflows.adapter_dir import tasks_of

    adapter, *others = given
    if tasks:
        if given[-1] is not None:
            got = " and ".join(map(str, given))
            raise ValueError(f"with --task there is no ADAPTER: give {' and '.join(names)} alone, got {got}.")
        adapter, others = None, [*given[:-1]]
    elif adapter is None:
        raise ValueError("there is no adapter: give its folder, or many with --task NAME=ADAPTER.")
    if needed and None in others:
        raise ValueError(f"there is no {names[others.index(None)]}: name it behind the adapter.")
    found: dict[Any, str] = {**(tasks_of(tasks or [], adapter) or {None: str(adapter)})}
    return found, others


def prepare_folder(*files: Path | None) -> None:
    """Makes the folders that files are to be written to, so that nothing fails at the end."""
    for file in files:
        if file is None:
            continue
        if file.is_dir():
            raise ValueError(f"{file} is a folder: name a file.")
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=file.parent):
            pass


def check_folder(folder: str) -> None:
    """Refuses a folder that cannot be made, or written to, before anything is computed for it."""
    place = Path(folder).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file: name a folder.")
    with TemporaryFile(dir=there):
        pass


def write(report: dict[str, Any], file: Path | None) -> None:
    """Writes a result to the JSON file that was asked for, if one was."""
    if file is not None:
        write_json(file, report)
