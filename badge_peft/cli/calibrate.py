"""`badge-peft calibrate`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from badge_peft.cli import options as shared
from badge_peft.cli.errors import warn
from badge_peft.workflows.settings import Columns, Goal

_DATA = f"Texts to calibrate on. Default: the exit logits that train left in the folder. {shared.DATA}"


def calibrate(
    adapter: Annotated[str, Parameter(help="Folder of the adapter.")],
    data: Annotated[str | None, Parameter(help=_DATA)] = None,
    /,
    *,
    goal: shared.Goal = Goal(),
    metric: shared.Metric = None,
    columns: shared.Columns = Columns(),
    batch_size: shared.BatchSize = 32,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Choose how an adapter stops, and write the choice into its adapter_config.json.

    Nothing else in the folder changes but the numbers of its card, and nothing is trained: an adapter can be
    calibrated again, in seconds, whenever another speed is wanted.
    """
    from badge_peft.workflows.calibrate import calibrate_adapter
    from badge_peft.workflows.report import summary

    report = calibrate_adapter(adapter, data, columns, goal, metric, base_model, batch_size, device)
    print(f"{summary(report)}\nwritten to {report['written']}")
    for note in report["notes"]:
        warn(f"note: {note}")
