"""`badge-peft sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from badge_peft.cli import options as shared
from badge_peft.workflows.settings import Columns

_SOURCE = "An adapter's folder (or repository), or a file of exit logits."
_DATA = f"Texts to run through the adapter. Default: the exit logits that train left in its folder. {shared.DATA}"


def sweep(
    adapter_or_logits: Annotated[str, Parameter(help=_SOURCE)],
    data: Annotated[str | None, Parameter(help=_DATA)] = None,
    /,
    *,
    policies: Annotated[
        str | None, Parameter(help="Policies to compare, with commas. Default: divergence,patience,entropy,max_prob.")
    ] = None,
    points: Annotated[int, Parameter(validator=Number(gte=2), help="Settings of each policy.")] = 20,
    metric: shared.Metric = None,
    plot: Annotated[Path | None, Parameter(help="Draw the curves into this file (png, svg or pdf).")] = None,
    json_file: shared.JsonFile = None,
    columns: shared.Columns = Columns(),
    batch_size: shared.BatchSize = 32,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Show what every setting of a policy would cost and save, without choosing one.

    The fixed depths, where every text stops at the same block, are always shown beside the policies: a policy is worth
    having where it beats them.
    """
    from badge_peft import evaluation
    from badge_peft.early_exit.policies import POLICIES
    from badge_peft.utils.checks import check_choice
    from badge_peft.workflows.evaluate import default_metric, logits_of
    from badge_peft.workflows.report import tradeoff_table

    names = None if policies is None else [name.strip() for name in policies.split(",") if name.strip()]
    for name in names or []:
        check_choice("policies", name, tuple(POLICIES))
    exit_logits = logits_of(adapter_or_logits, data, columns, base_model, batch_size, device)
    scored = exit_logits.labeled()
    shared.prepare_folder(plot, json_file)
    found = evaluation.sweep(scored, names, points, metric or default_metric(scored.problem_type))
    print(tradeoff_table(found, against_full_depth=exit_logits.labels is None))
    if json_file is not None:
        found.save(json_file)
    if plot is not None:
        from badge_peft.evaluation.plots import plot_tradeoff

        plot_tradeoff(found, plot)
