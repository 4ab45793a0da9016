"""`calibrate_adapter`: another early-exit policy for an adapter that is there. What `badge-peft calibrate` does."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig, check_policy_name
from badge_peft.evaluation import ExitLogits, calibrate
from badge_peft.evaluation.costs import CostModel
from badge_peft.model_card import CARD, read_card, write_model_card
from badge_peft.ranking import calibrate_ranking
from badge_peft.workflows.adapter_dir import check_ranking_metric, read_config, recorded_task, write_early_exit
from badge_peft.workflows.evaluate import logits_of, measure, metric_of, own_top_k
from badge_peft.workflows.settings import Columns, Goal


def calibrate_adapter(
    folder: str,
    data: str | None = None,
    columns: Columns = Columns(),
    goal: Goal = Goal(),
    metric: str | None = None,
    base_model: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> tuple[EarlyExitConfig, dict[str, Any], list[str]]:
    """Calibrates an adapter in a local folder and writes its `adapter_config.json`, of which nothing but the policy
    changes, and the numbers of its card.

    Rows are those of `data`, which is read and run as in `logits_of`; None takes the exit logits stored in the folder.
    The top k of a ranking is by default the adapter's own. Returns the config, what `measure` says of it, and what the
    calibration warned of."""
    check_policy_name(goal.policy, "auto")
    config = read_config(folder)
    read_card(Path(folder))  # what stands there is kept
    if recorded_task(folder, config.get("early_exit")) == "ranking":
        check_ranking_metric(metric)
        goal = replace(goal, top_k=goal.top_k or own_top_k(folder))
        goal.ranking_arguments()
    else:
        goal.arguments()
    exit_logits = logits_of(folder, data, columns, base_model, batch_size, device)
    stored = (config.get("early_exit") or {}).get("calibration") or {}
    costs = CostModel.from_dict(stored["costs"]) if "costs" in stored else None
    chosen, measured, notes = choose(exit_logits, goal, metric, costs)
    write_early_exit(folder, chosen)
    if (Path(folder) / CARD).exists():
        write_model_card(folder)
    return chosen, measured, notes


def choose(
    exit_logits: ExitLogits, goal: Goal, metric: str | None = None, costs: CostModel | None = None
) -> tuple[EarlyExitConfig, dict[str, Any], list[str]]:
    """The config that `calibrate` chooses (of rows with queries, `calibrate_ranking`), what `measure` says of it, and
    what the calibration warned of."""
    metric = metric_of(exit_logits, metric)
    if exit_logits.groups is not None:
        chosen = calibrate_ranking(exit_logits, **goal.ranking_arguments())
        return chosen, measure(exit_logits, chosen), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = calibrate(exit_logits, goal.policy, metric=metric, costs=costs, **goal.arguments())
    notes = [str(w.message) for w in caught if w.category is UserWarning]
    return chosen, measure(exit_logits, chosen, metric), notes


def take_full_depth(
    exit_logits: ExitLogits, goal: Goal, metric: str
) -> tuple[EarlyExitConfig, dict[str, Any], list[str]]:
    """As `choose`, for exits of which none is worth stopping at: the policy `never`, whatever the goal."""
    found = measure(exit_logits, EarlyExitConfig(policy="never"), metric)
    record = {name: found[name] for name in ("metric", "labels", "rows", "full_depth_score", "weights_hash")}
    record |= {name: found["early_exit"][name] for name in ("score", "mean_exit", "blocks_saved")}
    scores = {str(m): value for m, value in zip(found["exit_layers"], found["per_exit"], strict=True)}
    record |= {"policy_asked_for": goal.policy, "exit_scores": scores}
    return EarlyExitConfig(policy="never", calibration=record), found, []
