"""How `calibrate` chooses: within a policy the fastest setting that is within the drop, then between policies.

A search takes the luckiest of many settings, so a score on the rows that chose it is too high. A *rule* takes the
fastest setting of a policy whose drop plus `strictness` standard errors is within the allowed one, as that of every
slower setting of the same form is. Cross-fitting measures the rule: the setting that four folds choose answers the
fifth. The least strict rule is taken whose drop on held-out rows, with an allowance for its own noise, is within the
allowed drop. A stricter one is left to try, so noise makes a policy slower and does not rule it out. Each policy is
judged by itself, and of those that pass the fastest wins: more policies never take a setting away.

Sources: Breiman and Spector, "Submodel Selection and Evaluation in Regression: the X-Random Case", 1992 (selection
inside of cross-validation, and the rule of a standard error); Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 11 (the jackknife).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import FixedDepthPolicy, build_policy
from badge_peft.evaluation.candidates import settings
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric, is_ratio, ratio_parts, scorer

Array = np.ndarray
FOLDS = 5
SETTINGS = 30  # of one form of a policy
STRICTNESS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # standard errors
#: Probability with which the drop on held-out rows lies within the allowed one.
LEVEL = 0.65
_GROUPS = 10  # of the jackknife, for scores that are no ratio of sums

#: From rows, the forms of a policy that are tried on them.
Forms = Callable[[ExitLogits], Iterable[EarlyExitConfig]]
#: From a config and the blocks [N] at which rows stop, the share of the cost that it saves.
Saving = Callable[[EarlyExitConfig, ExitLogits, Array], float]


@dataclass(frozen=True)
class Setting:
    """One setting on some rows.

    Args:
        form: Which form of its policy it is of.
        config: The setting.
        saved: The share of the cost that it saves.
        drop: Score of the reference less its score.
        error: The standard error of the drop.
    """

    form: int
    config: EarlyExitConfig
    saved: float
    drop: float
    error: float


@dataclass(frozen=True)
class Choice:
    """What a policy offers.

    Args:
        setting: Chosen on all rows.
        strictness: Of the rule that chose it.
        drop: Of that rule, on rows that did not choose.
        error: Its standard error.
        saved: What that rule saves there.
    """

    setting: Setting
    strictness: float
    drop: float
    error: float
    saved: float


def settings_of(
    exit_logits: ExitLogits, forms: Forms, metric: Metric, reference: int, saving: Saving
) -> list[Setting]:
    """All settings of a policy on these rows, form by form, slow to fast.

    Args:
        exit_logits: With labels.
        forms: Of the policy.
        metric: As for `exit_scores`.
        reference: Block number of the exit from which drops are counted.
        saving: What a setting saves.
    """
    history, units = exit_logits.history(), exit_logits.units
    tried = [
        (form, config, stops)
        for form, family in enumerate(forms(exit_logits))
        for config, stops in settings(family, history, SETTINGS, units)
    ]
    if not tried:
        return []
    stops = np.stack([stops for *_, stops in tried])
    drops, errors = drops_of(exit_logits, reference, stops, metric, distinct(exit_logits))
    return [
        Setting(form, config, saving(config, exit_logits, stops), drop, error)
        for (form, config, stops), drop, error in zip(tried, drops.tolist(), errors.tolist(), strict=True)
    ]


def distinct(exit_logits: ExitLogits) -> Array:
    """[U]: a number for each unit, the same for those that every exit answers alike: one input that came twice says as
    much as once."""
    sums = exit_logits.units.total(exit_logits.logits.flatten(1).double().numpy().T).T
    return np.unique(sums.round(3), axis=0, return_inverse=True)[1].reshape(-1)


def drops_of(
    exit_logits: ExitLogits, reference: int, stops: Array, metric: Metric, inputs: Array
) -> tuple[Array, Array]:
    """What settings lose.

    Args:
        exit_logits: With labels.
        reference: Block number of the exit from which drops are counted.
        stops: [S, N], the blocks at which rows stop.
        metric: As for `exit_scores`.
        inputs: [U], `distinct`.

    Returns:
        The drop [S] and its standard error [S], which counts one input more that was lost: where no answer changes,
        nothing is known of those that would.
    """
    stops, places = np.unique(stops, axis=0, return_inverse=True)
    places = places.reshape(-1)
    full = np.full(len(exit_logits), reference, dtype=np.int64)
    first, *answers = [exit_logits.predicted(s) for s in (full, *stops)]
    n, different = len(exit_logits.units), int(inputs.max()) + 1
    if is_ratio(metric):
        above, below = ratio_parts(exit_logits, first, metric)
        base = above.sum() / max(below.sum(), 1)
        drops, errors = np.empty(len(answers)), np.empty(len(answers))
        own = (above - base * below) / max(below.mean(), 1e-12)  # what each unit adds to the score, to first order

        def together(values: Array) -> Array:
            return np.bincount(inputs, values, different)

        for i, answer in enumerate(answers):
            a, b = ratio_parts(exit_logits, answer, metric)
            score = a.sum() / max(b.sum(), 1)
            change = own - (a - score * b) / max(b.mean(), 1e-12)
            drops[i], errors[i] = base - score, np.sqrt(np.square(together(change)).sum() / n**2 + 1 / different**2)
        return drops[places], errors[places]
    measure, labels = scorer(exit_logits, metric), exit_logits.targets
    drops = measure(first) - np.array([measure(a) for a in answers])
    parts = _folds(inputs, _GROUPS)
    if len(parts) < 2:
        return drops[places], np.abs(drops[places]) + 1
    left = np.empty((len(parts), len(answers)))
    for g, part in enumerate(parts):
        rows = exit_logits.units.rows_of(np.setdiff1d(np.arange(n), part))
        left[g] = measure(first[rows], labels[rows]) - np.array([measure(a[rows], labels[rows]) for a in answers])
    errors = np.sqrt((len(parts) - 1) * left.var(axis=0) + 1 / different**2)
    return drops[places], errors[places]


def fastest_within(found: list[Setting], max_score_drop: float, strictness: float) -> Setting | None:
    """What a rule takes. As much is saved as by the fastest setting that is, with all slower ones of its form, within
    the drop; of these and of the fixed depths that save as much, the one that loses least is taken."""
    able: list[Setting] = []
    for form in sorted({setting.form for setting in found}):
        reached = False
        for setting in sorted((s for s in found if s.form == form), key=lambda s: s.saved):
            if setting.drop + strictness * setting.error > max_score_drop + 1e-12:
                if reached:
                    break
                continue  # slower than the reference, which need not be the last exit
            reached = True
            able.append(setting)
    depths = [setting for setting in found if setting.config.policy == FixedDepthPolicy.name]
    return best_at(able + depths, max(setting.saved for setting in able)) if able else None


def choose_within(
    exit_logits: ExitLogits, forms: Forms, metric: Metric, reference: int, saving: Saving, max_score_drop: float
) -> Choice | None:
    """The fastest setting of one policy that the rows can carry; None: there is none.

    Args:
        exit_logits: With labels.
        forms: Of the policy.
        metric: As for `exit_scores`.
        reference: Block number of the exit from which drops are counted.
        saving: What a setting saves.
        max_score_drop: The drop that is allowed.
    """
    inputs = distinct(exit_logits)
    found = settings_of(exit_logits, forms, metric, reference, saving)
    held = list(_held_out(exit_logits, forms, metric, reference, saving))
    for strictness in STRICTNESS if len(held) > 1 else ():
        setting = fastest_within(found, max_score_drop, strictness)
        if setting is None:
            return None
        stops = np.full(len(exit_logits), reference, dtype=np.int64)
        saved = 0.0
        for rows, tested, tried in held:
            own = fastest_within(tried, max_score_drop, strictness)
            if own is not None:
                part = build_policy(own.config).replay_history(tested.history())
                stops[rows] = part
                saved += saving(own.config, tested, part) * len(tested.units) / len(exit_logits.units)
        (drop,), (error,) = drops_of(exit_logits, reference, stops[None], metric, inputs)
        if drop + norm.ppf(LEVEL) * error <= max_score_drop + 1e-12:
            return Choice(setting, strictness, float(drop), float(error), saved)
    return None


def best_at(found: list[Setting], target: float) -> Setting | None:
    """The least drop among settings that save at least `target`; of equal ones the fastest. None: none does."""
    good = [setting for setting in found if setting.saved >= target - 1e-12]
    return min(good, key=lambda s: (s.drop, -s.saved), default=None)


def held_out_at(
    exit_logits: ExitLogits, forms: Forms, metric: Metric, reference: int, saving: Saving, target: float
) -> tuple[float, float] | None:
    """The drop, and its standard error, of the settings that are best at a saving, on rows that did not choose them;
    None where a fold does not reach it."""
    stops = np.full(len(exit_logits), -1, dtype=np.int64)
    for rows, tested, tried in _held_out(exit_logits, forms, metric, reference, saving):
        own = best_at(tried, target)
        if own is not None:
            stops[rows] = build_policy(own.config).replay_history(tested.history())
    if (stops < 0).any():
        return None
    (drop,), (error,) = drops_of(exit_logits, reference, stops[None], metric, distinct(exit_logits))
    return float(drop), float(error)


def interval(drop: float, error: float) -> tuple[float, float]:
    """90% around a drop."""
    half = float(norm.ppf(0.95)) * error
    return drop - half, drop + half


def _held_out(
    exit_logits: ExitLogits, forms: Forms, metric: Metric, reference: int, saving: Saving
) -> Iterator[tuple[Array, ExitLogits, list[Setting]]]:
    """The folds: their rows, themselves, and the settings as the other folds see them."""
    units = exit_logits.units
    folds = _folds(distinct(exit_logits), FOLDS)
    for fold in folds if len(folds) > 1 else ():
        rows = units.rows_of(fold)
        others = exit_logits.select(torch.from_numpy(units.rows_of(np.setdiff1d(np.arange(len(units)), fold))))
        tested = exit_logits.select(torch.from_numpy(rows))
        yield rows, tested, settings_of(others, forms, metric, reference, saving)


def _folds(inputs: Array, count: int) -> list[Array]:
    """The units in at most `count` parts, equal inputs in one."""
    different = np.random.default_rng(0).permutation(int(inputs.max()) + 1)
    return [np.flatnonzero(np.isin(inputs, part)) for part in np.array_split(different, min(count, len(different)))]
