"""How `calibrate` chooses: within a policy the fastest setting that is within the drop, then between policies.

A search takes the luckiest of many settings, so a score on the rows that chose it is too high. A *rule* takes the
fastest setting of a policy whose drop plus `strictness` standard errors is within the allowed one, as that of every
slower setting of the same form is. Cross-fitting measures the rule: the setting that four folds choose answers the
fifth. The least strict rule is taken whose drop on held-out rows, with an allowance for its own noise, is within the
allowed drop. A stricter one is left to try, so noise makes a policy slower and does not rule it out. Each policy is
judged by itself, and of those that pass the fastest wins: more policies never take a setting away.

Sources: Breiman and Spector, "Submodel Selection and Evaluation in Regression: the X-Random Case", 1992 (selection
inside of cross-validation, and the rule of a standard error).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from scipy.stats import norm

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import FixedDepthPolicy, build_policy
from badge_peft.evaluation.candidates import settings
from badge_peft.evaluation.costs import CostModel
from badge_peft.evaluation.drops import Drops, folds_of
from badge_peft.evaluation.exit_logits import ExitLogits

Array = np.ndarray
FOLDS = 5
SETTINGS = 30  # of one form of a policy
STRICTNESS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # standard errors
#: Probability with which the drop on held-out rows lies within the allowed one.
LEVEL = 0.65

#: From rows, the forms of a policy that are tried on them.
Forms = Callable[[ExitLogits], Iterable[EarlyExitConfig]]


@dataclass(frozen=True)
class Setting:
    """A setting of a form on some rows: the share of the cost that it saves, the drop as estimated, with its standard
    error, and as counted on these rows."""

    form: int
    config: EarlyExitConfig
    saved: float
    drop: float
    error: float
    counted: float


@dataclass(frozen=True)
class Choice:
    """What a policy offers: a setting, chosen on all rows by a rule, and that rule's drop, standard error and saving
    on rows that did not choose."""

    setting: Setting
    drop: float
    error: float
    saved: float


@dataclass(frozen=True)
class Fold:
    """Rows [n] that test what the others choose."""

    rows: Array
    tested: ExitLogits
    others: Drops


def held_out(drops: Drops) -> list[Fold]:
    """The folds of all rows; none where there are too few different inputs."""
    rows, units = drops.exit_logits, drops.exit_logits.units
    parts = folds_of(drops.inputs, FOLDS)
    found = []
    for part in parts if len(parts) > 1 else ():
        rest = torch.from_numpy(units.rows_of(np.setdiff1d(np.arange(len(units)), part)))
        own = units.rows_of(part)
        others = Drops(rows.select(rest), drops.reference, drops.metric)
        found.append(Fold(own, rows.select(torch.from_numpy(own)), others))
    return found


def settings_of(drops: Drops, forms: Forms, costs: CostModel) -> list[Setting]:
    """All settings of a policy on some rows, form by form, slow to fast."""
    rows = drops.exit_logits
    found, all_stops = [], []
    for form, family in enumerate(forms(rows)):
        tried = settings(family, rows.history(), SETTINGS, rows.units)
        if not tried:
            continue
        stops = np.stack([stops for _, stops in tried])
        if build_policy(family).grid(rows.exits, rows.kind) is None:  # a threshold changes no price
            saved = costs.time_saved(family, rows, stops)
        else:
            saved = np.array([costs.time_saved(config, rows, own) for config, own in tried])
        found += [(form, config, share) for (config, _), share in zip(tried, saved.tolist(), strict=True)]
        all_stops.append(stops)
    if not found:
        return []
    lost = np.stack(drops.of(np.concatenate(all_stops)), axis=1).tolist()
    return [Setting(*own, *each) for own, each in zip(found, lost, strict=True)]


def fastest_within(found: list[Setting], max_score_drop: float, strictness: float) -> Setting | None:
    """What a rule takes. As much is saved as by the fastest setting that is, with all slower ones of its form, within
    the drop; of these and of the fixed depths that save as much, the one that loses least is taken."""
    able: list[Setting] = []
    for _, form in groupby(found, key=lambda s: s.form):
        reached = False
        for setting in sorted(form, key=lambda s: s.saved):
            if setting.drop + strictness * setting.error > max_score_drop + 1e-12:
                if reached:
                    break
                continue  # slower than the reference, which need not be the last exit
            reached = True
            able.append(setting)
    depths = [setting for setting in found if setting.config.policy == FixedDepthPolicy.name]
    return best_at(able + depths, max(setting.saved for setting in able)) if able else None


def choose_within(
    drops: Drops, folds: list[Fold], forms: Forms, costs: CostModel, max_score_drop: float
) -> Choice | None:
    """The fastest setting of one policy that the rows can carry; None: there is none."""
    found = settings_of(drops, forms, costs)
    tried = [settings_of(fold.others, forms, costs) for fold in folds]
    for strictness in STRICTNESS if folds else ():
        setting = fastest_within(found, max_score_drop, strictness)
        if setting is None:
            return None
        chosen = [fastest_within(own, max_score_drop, strictness) for own in tried]
        drop, error, saved = _crossed(drops, folds, chosen, costs)
        if drop + norm.ppf(LEVEL) * error <= max_score_drop + 1e-12:
            return Choice(setting, drop, error, saved)
    return None


def _crossed(
    drops: Drops, folds: list[Fold], chosen: list[Setting | None], costs: CostModel
) -> tuple[float, float, float]:
    """Drop, standard error and saving where each fold is answered by the setting that the others chose, or by the
    reference, which saves nothing, where they chose none."""
    rows = drops.exit_logits
    stops, saved = np.full(len(rows), drops.reference, dtype=np.int64), 0.0
    for fold, setting in zip(folds, chosen, strict=True):
        if setting is not None:
            part = build_policy(setting.config).replay_history(fold.tested.history())
            stops[fold.rows] = part
            share = len(fold.tested.units) / len(rows.units)
            saved += float(costs.time_saved(setting.config, fold.tested, part)) * share
    (drop,), (error,), _ = drops.of(stops[None])
    return float(drop), float(error), saved


def best_at(found: list[Setting], target: float) -> Setting | None:
    """The least drop, as counted, among settings that save at least `target`; of equal ones the fastest. None: none
    does."""
    good = [setting for setting in found if setting.saved >= target - 1e-12]
    return min(good, key=lambda s: (s.counted, -s.saved), default=None)


def held_out_at(
    drops: Drops, folds: list[Fold], forms: Forms, costs: CostModel, target: float
) -> tuple[float, float] | None:
    """The drop, and its standard error, of the settings that are best at a saving, on rows that did not choose them;
    None where a fold does not reach it."""
    chosen = [best_at(settings_of(fold.others, forms, costs), target) for fold in folds]
    return _crossed(drops, folds, chosen, costs)[:2] if chosen and None not in chosen else None


def interval(drop: float, error: float) -> tuple[float, float]:
    """90% around a drop."""
    half = float(norm.ppf(0.95)) * error
    return drop - half, drop + half
