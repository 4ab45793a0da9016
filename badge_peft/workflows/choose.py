"""`choose_rule`: another exit rule for an adapter that is there already. What `badge-peft calibrate` does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from badge_peft.early_exit.registry import check_policy_name
from badge_peft.evaluation import calibrate
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.model_card import CARD, write_card
from badge_peft.workflows.adapter import CONFIG, check_adapter, read_config, write_early_exit
from badge_peft.workflows.evaluate import logits_of
from badge_peft.workflows.measure import check_metric, default_metric, measure
from badge_peft.workflows.settings import Columns, Goal


def choose_rule(
    folder: str,
    data: str | None = None,
    columns: Columns = Columns(),
    goal: Goal = Goal(),
    metric: str | None = None,
    base_model: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """Calibrates an adapter and writes its `adapter_config.json`, of which nothing but the exit rule changes, and the
    numbers of its card.

    Args:
        folder: Of the adapter; local.
        data: Rows to calibrate on; None takes the exit logits stored in the folder.
        columns: What is read of the data.
        goal: Which policies to search, and for what.
        metric: None is accuracy, for regression Pearson.
        base_model: See `open_adapter`.
        batch_size: Rows per pass.
        device: See `open_adapter`.

    Returns:
        As `measure`, and `written`, the file, and `notes`, what the calibration warned of.

    Raises:
        OSError: something is not there.
        ValueError: something is not what it should be; nothing has been written then.
    """
    check_policy_name(goal.policy, "auto")
    wanted = goal.arguments()
    check_adapter(folder)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no local folder, so its exit rule cannot be changed: download it first.")
    exit_logits = logits_of(folder, data, columns, base_model, batch_size, device)
    check_fit(folder, exit_logits)
    kind = str(exit_logits.problem_type)
    check_metric(metric, kind, exit_logits.logits.shape[-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = calibrate(exit_logits, goal.policy, metric=metric or default_metric(kind), **wanted)
    write_early_exit(folder, chosen)
    if (Path(folder) / CARD).exists():
        write_card(folder)
    notes = [str(w.message) for w in caught if w.category is UserWarning]
    return {**measure(exit_logits, chosen, metric), "written": str(Path(folder) / CONFIG), "notes": notes}


def check_fit(folder: str, exit_logits: ExitLogits) -> None:
    """Refuses stored logits that are not of this adapter.

    Raises:
        ValueError: they have another number of blocks or of outputs.
    """
    config = read_config(folder)
    blocks, labels = config.get("num_blocks"), config.get("num_labels")
    found = (exit_logits.depth, exit_logits.logits.shape[-1])
    if (blocks is not None and blocks != found[0]) or (labels is not None and labels != found[1]):
        raise ValueError(
            f"the exit logits are of a model with {found[0]} blocks and {found[1]} outputs, but the adapter in "
            f"{folder} has {blocks} and {labels}: give the data to run through the adapter."
        )
