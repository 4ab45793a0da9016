"""`calibrate`: the fastest setting that keeps a score, or the best score at a speed; with a bound on new data.

How settings are chosen is in `selection.py`; what they cost is a `CostModel` (`costs.py`); a bound that holds with a
stated confidence is in `confidence.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any, cast

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.candidates import fewer_exits, fixed_depths, templates_of, variants
from badge_peft.evaluation.confidence import certified
from badge_peft.evaluation.costs import WORTH, CostModel
from badge_peft.evaluation.curve import curve_record, setting_curve
from badge_peft.evaluation.drops import Drops
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import ExitScores, Metric, exit_scores, metric_name
from badge_peft.evaluation.per_exit import per_exit as settings_per_exit
from badge_peft.evaluation.selection import (
    Choice,
    Forms,
    best_at,
    choose_within,
    held_out,
    held_out_at,
    interval,
    settings_of,
)
from badge_peft.evaluation.tradeoff import curve_points, evaluate_policy, pareto
from badge_peft.utils.checks import check_number

SEVERAL = 0.02  # share that a setting with numbers for each exit has to save more than one with a single number
PER_EXIT_STARTS = 20  # settings of a form from which thresholds for each exit are searched


def calibrate(
    exit_logits: ExitLogits,
    policy: str | dict[str, Any] | EarlyExitConfig = "divergence",
    max_score_drop: float | None = None,
    target_blocks_saved: float | None = None,
    target_time_saved: float | None = None,
    confidence: float | None = None,
    metric: Metric = "accuracy",
    per_exit: bool = False,
    costs: CostModel | None = None,
    target_speedup: float | None = None,
) -> EarlyExitConfig:
    """Chooses threshold and patience on stored exit logits, and with `costs` at which exits rows may stop.

    The fixed depths between `min_exit` and `max_exit` are always among the candidates, so that what is returned is
    never worse, on this data, than one of the same cost. Policies that read one exit alone are tried with fewer exits,
    too.

    A drop is counted from full depth where that is the deployed model's own head (`ExitLogits.deployed`) or where
    there are no labels, else from the best exit. It is estimated on rows that did not choose the settings; that of
    accuracy lies between the loss that is counted and the one that the calibrated probabilities of that exit expect.

    Args:
        exit_logits: Of data that the model was not trained on. Without labels the score is the agreement with full
            depth.
        policy: A name, or a config whose open fields are searched. `auto` searches every policy and takes the fastest.
        max_score_drop: The largest loss, in units of the score (0.01 is a point of accuracy): the fastest setting is
            chosen whose drop lies within it at a level of 65% (`selection.LEVEL`). Where the rows cannot carry that, a
            warning says so, and the answer is the exit that drops are counted from, for every row.
        target_blocks_saved: The share of blocks to save (0.5 is half of them): the best score at or above it.
        target_time_saved: The share of the time to save, by `costs`: the best score at or above it.
        confidence: For example 0.95: with this probability the mean loss of accuracy on new data of the same kind is
            below `max_score_drop` against full depth (Learn-then-Test; half of the rows find the settings, half test
            them); of token classification the mean over texts of what their tokens lose.
        metric: As for `exit_scores`.
        per_exit: Also try settings that differ from exit to exit: a threshold for each, and for `max_prob` a
            temperature for each, fitted on the labels. They are taken where they save more, or at a target lose less,
            on rows that did not choose them. Not tried where a policy counts exits in a row.
        costs: Of a call, from `measure_costs`: the expected time is minimized. None: the blocks are.
        target_speedup: The old name of `target_blocks_saved`.

    Returns:
        The config; its `calibration` records what was measured here: `score` on all of these rows, `drop`, of rows
        that did not choose the setting, with a 90% interval, `time_saved` as `costs` predict it, and as `curve` what
        other thresholds would cost and give. Where `costs` say that less than a tenth of the time would be saved
        within `max_score_drop`, the policy is `never`, and `calibration["not_worth_it"]` says why.

    Raises:
        ValueError: not exactly one of the goals, a goal out of range or out of reach, or too few rows for the
            confidence.
    """
    if target_speedup is not None:
        warnings.warn(
            "target_speedup is the share of blocks to save: say target_blocks_saved. The old name goes after 0.1.",
            FutureWarning,
            stacklevel=2,
        )
        target_blocks_saved = target_speedup
    check_number("max_score_drop", max_score_drop, lambda drop: drop >= 0, "it must be 0 or more")
    targets = {"target_blocks_saved": target_blocks_saved, "target_time_saved": target_time_saved}
    targets = {name: target for name, target in targets.items() if target is not None}
    if len(targets) + (max_score_drop is not None) != 1:
        raise ValueError("calibrate needs exactly one of max_score_drop, target_blocks_saved and target_time_saved.")
    for name, target in targets.items():
        check_number(name, target, lambda share: 0 <= share < 1, "it is a share, in [0, 1)")
    if target_time_saved is not None and costs is None:
        raise ValueError("target_time_saved needs costs: measure them with measure_costs, or save blocks.")
    scored = exit_logits.labeled()
    templates = templates_of(policy, scored)
    asked = "auto" if policy == "auto" else templates[0].policy
    scores = exit_scores(scored, metric)
    by_best = exit_logits.labels is not None and not exit_logits.deployed
    reference = scores.best_exit if by_best else exit_logits.exits[-1]
    goal_costs = CostModel.of_blocks(exit_logits.depth) if costs is None or target_blocks_saved else costs
    record: dict[str, Any] = {}
    if confidence is not None:
        chosen, rows = certified(scored, policy, max_score_drop, confidence, metric, per_exit)
        record = {"confidence": confidence, "max_score_drop": max_score_drop, "test_rows": rows}
    else:
        groups, drops = policies_of(templates, asked == "auto", per_exit), Drops(scored, reference, metric)
        if max_score_drop is not None:
            found = _within(drops, groups, goal_costs, max_score_drop)
        else:
            ((name, target),) = targets.items()
            found = _at_target(drops, groups, goal_costs, name, cast(float, target))
        if found is None:
            tried = [s.drop for forms in groups for s in settings_of(drops, forms, goal_costs)]
            _check_reach(tried, scores, reference, cast(float, max_score_drop))
            chosen = _one_depth(templates[0], reference, scores)
            warnings.warn(
                f"{len(scored.units)} rows cannot show that any setting loses at most {max_score_drop}, so every row "
                f"is answered at block {chosen.depth}. Give more rows, or allow more.",
                stacklevel=2,
            )
        else:
            chosen, drop, error = found
            limits = list(interval(drop, error))
            record = {"drop": drop, "drop_interval": limits, "drop_from": "best" if by_best else "last"}
    if chosen.policy == "fixed_depth" and asked not in ("fixed_depth", "auto"):
        warnings.warn(
            f"no setting of policy={asked!r} beats answering at block {chosen.depth} for every row on this data; "
            "that is what is returned. Try policy='auto'.",
            stacklevel=2,
        )
    predicted = None
    if costs is not None:
        stops = build_policy(chosen).replay_history(scored.history())
        predicted = float(costs.time_saved(chosen, scored, stops))
    if predicted is not None and max_score_drop is not None and predicted < WORTH:
        record["not_worth_it"] = why_not(scores, predicted, max_score_drop, reference)
        chosen, predicted = EarlyExitConfig(policy="never"), 0.0
        warnings.warn(record["not_worth_it"], stacklevel=2)
    point = evaluate_policy(scored, chosen, metric)
    record = {
        "policy_asked_for": asked,
        "metric": metric_name(metric),
        "labels": "given" if exit_logits.labels is not None else "full depth's own answers",
        "rows": len(exit_logits.units),
        **({} if exit_logits.texts is None else {"tokens": len(exit_logits)}),
        "weights_hash": exit_logits.weights_hash,
        "score": point.score,
        "full_depth_score": scores.per_exit[-1],
        "exit_scores": {str(m): s for m, s in zip(scores.exit_layers, scores.per_exit, strict=True)},
        "mean_exit": point.mean_exit,
        "blocks_saved": point.blocks_saved,
        **({} if costs is None else {"time_saved": predicted, "costs": costs.to_dict()}),
        "curve": curve_record(scored, setting_curve(scored, chosen, metric)),
        **record,
    }
    return EarlyExitConfig.of(chosen, calibration=record)


def policies_of(templates: list[EarlyExitConfig], capped: bool = False, per_exit: bool = False) -> list[Forms]:
    """What is searched, policy by policy, each as a function that gives its forms for some rows, with the fixed depths
    among them; where several policies are, the depths are one of them."""
    groups: dict[str, list[EarlyExitConfig]] = {}
    for template in templates:
        groups.setdefault(template.policy, []).append(template)
    each = (False, True) if per_exit else (False,)
    found = [partial(_forms, templates[0], own, capped, several) for own in groups.values() for several in each]
    return [*found, partial(_forms, templates[0], [], False, False)] if len(groups) > 1 else [*found]


def _forms(
    bounds: EarlyExitConfig, templates: list[EarlyExitConfig], capped: bool, per_exit: bool, rows: ExitLogits
) -> list[EarlyExitConfig]:
    own = variants(templates, rows, per_exit, capped)
    if not per_exit:
        fewer = [replace(form, exit_layers=few) for form in own for few in fewer_exits(form, rows)]
        return [fixed_depths(bounds, rows), *own, *fewer]
    alike = variants(templates, rows, capped=capped)
    starts = [point.config for point in pareto(curve_points(rows, own, PER_EXIT_STARTS, "accuracy"))]
    return [*(form for form in own if form not in alike), *settings_per_exit(starts, rows)]


def _within(
    drops: Drops, groups: list[Forms], costs: CostModel, max_score_drop: float
) -> tuple[EarlyExitConfig, float, float] | None:
    """The fastest setting within the drop, with its drop and standard error on rows that did not choose it."""
    folds = held_out(drops)
    found = [choose_within(drops, folds, forms, costs, max_score_drop) for forms in groups]
    best = max((choice for choice in found if choice is not None), key=_worth, default=None)
    return None if best is None else (best.setting.config, best.drop, best.error)


def _worth(choice: Choice) -> tuple[float, float]:
    several = isinstance(choice.setting.config.threshold, list) or choice.setting.config.temperature is not None
    return choice.saved - SEVERAL * several, -choice.drop  # on rows that did not choose


def _check_reach(drops: list[float], scores: ExitScores, reference: int, max_score_drop: float) -> None:
    """Refuses bounds between which no drop comes near enough to the reference."""
    if min(drops) > max_score_drop + 1e-12:
        wanted = scores.per_exit[scores.exit_layers.index(reference)]
        name = "full depth" if reference == scores.exit_layers[-1] else "the best exit"
        raise ValueError(
            f"max_score_drop={max_score_drop} cannot be reached between min_exit and max_exit: {name} scores "
            f"{wanted:.4f} and {wanted - min(drops):.4f} is the most there. Allow a larger drop, an earlier min_exit "
            "or a deeper max_exit."
        )


def _one_depth(bounds: EarlyExitConfig, reference: int, scores: ExitScores) -> EarlyExitConfig:
    """The exit that drops are counted from, or the best up to `max_exit`, for every row."""
    cap = bounds.max_exit
    if cap is not None and reference > cap:
        reference = max((s, m) for m, s in zip(scores.exit_layers, scores.per_exit, strict=True) if m <= cap)[1]
    return EarlyExitConfig(policy="fixed_depth", depth=reference, min_exit=bounds.min_exit, max_exit=cap)


def why_not(scores: ExitScores, saved: float, max_score_drop: float, reference: int) -> str:
    """Why early exits are not worth it, and what else would help."""
    wanted = scores.per_exit[scores.exit_layers.index(reference)] - max_score_drop
    weak = [m for m, s in zip(scores.exit_layers, scores.per_exit, strict=True) if s < wanted]
    exits = f"exits {weak[0]} to {weak[-1]}" if len(weak) > 1 else f"exit {weak[0]}" if weak else "the exits"
    return (
        f"Early exits are not worth it here: within a drop of {max_score_drop:g} they would save {max(saved, 0):.0%} "
        f"of the time, less than {WORTH:.0%}, so the model answers at full depth (policy 'never'). "
        f"{exits[0].upper()}{exits[1:]} score below {wanted:.4f}, which answers would need. What else helps: ONNX "
        "Runtime in int8 (`badge-peft export --int8`), more training rows, a trained backbone (--backbone lora), or a "
        "larger drop."
    )


def _at_target(
    drops: Drops, groups: list[Forms], costs: CostModel, name: str, target: float
) -> tuple[EarlyExitConfig, float, float]:
    """The best score at a saving of at least `target`, with the drop of so chosen settings on held-out rows."""
    most, found, folds = 0.0, [], held_out(drops)
    for forms in groups:
        tried = settings_of(drops, forms, costs)
        most = max([most, *(setting.saved for setting in tried)])
        own = best_at(tried, target)
        if own is not None:
            found.append((own, *(held_out_at(drops, folds, forms, costs, target) or (own.drop, own.error))))
    if not found:
        raise ValueError(f"{name}={target} cannot be reached: {most:.3f} is the most here.")
    setting, drop, error = min(found, key=lambda each: (each[1], -each[0].saved))
    return setting.config, drop, error
