"""Which configurations a sweep or a calibration tries: for each policy, settings spread over the speed-up range."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import POLICIES, ThresholdPolicy, build_policy, policy_class
from badge_peft.evaluation.exit_logits import ExitLogits, Units
from badge_peft.evaluation.metrics import exit_scores
from badge_peft.utils.problem import problem_of

Array = np.ndarray
_STARTS = 5  # exits from which on a policy is tried
MAX_PATIENCE = 4  # beyond it DGE has little speed-up left; PABEE's patience is always tried whole


def templates_of(policy: str | dict[str, Any] | EarlyExitConfig, exit_logits: ExitLogits) -> list[EarlyExitConfig]:
    """The configs whose open fields a search fills in: `policy`, of which a name leaves all open; of `auto` those of
    every policy that these exits can have, in all its forms."""
    if policy == "auto":
        learned = exit_logits.uncertainty is not None
        known = [kind for kind in POLICIES.values() if learned or not kind.reads_uncertainty]
        return [template for kind in known for template in kind.templates(exit_logits.kind)]
    if not isinstance(policy, str):
        return [EarlyExitConfig.of(policy)]
    takes_depth = policy in POLICIES and POLICIES[policy].takes_depth
    return [EarlyExitConfig(policy=policy, depth=exit_logits.depth if takes_depth else None)]


def fixed_depths(bounds: EarlyExitConfig, exit_logits: ExitLogits) -> EarlyExitConfig:
    """The form of every depth between the `min_exit` and `max_exit` of a config."""
    own = EarlyExitConfig(policy="fixed_depth", depth=exit_logits.depth)
    return replace(own, min_exit=bounds.min_exit, max_exit=bounds.max_exit)


def families(
    policy: str | dict[str, Any] | EarlyExitConfig, exit_logits: ExitLogits, per_exit: bool = False
) -> list[EarlyExitConfig]:
    """The variants of `policy` worth searching for these exits, each without its threshold; `auto` stands for every
    policy."""
    return variants(templates_of(policy, exit_logits), exit_logits, per_exit, capped=policy == "auto")


def variants(
    templates: Iterable[EarlyExitConfig], exit_logits: ExitLogits, per_exit: bool = False, capped: bool = False
) -> list[EarlyExitConfig]:
    """The forms of some templates, each without its threshold. Policies that have to be fitted are fitted here; with
    `per_exit` also what else a policy may fit for each exit; `capped` adds all of them with a cap at the exit that is
    best on this data."""
    history = exit_logits.history()
    patience = range(1, max(1, min(MAX_PATIENCE, len(history.exits) - 1)) + 1)
    found: list[EarlyExitConfig] = []
    for template in templates:
        built = build_policy(fitted(template, exit_logits))
        more = built.per_exit_forms(history, exit_logits.labels) if per_exit else []
        for form in (built, *map(build_policy, more)):
            found += form.variants(patience, history.problem_type)
    best = best_exit(exit_logits) if capped else exit_logits.exits[-1]
    if best == exit_logits.exits[-1]:
        return found
    return found + [replace(config, max_exit=best) for config in found if config.max_exit is None]


def fewer_exits(form: EarlyExitConfig, exit_logits: ExitLogits) -> list[list[int]]:
    """Blocks at which a policy that reads no other exit may decide: from some block on, or every second or third
    exit. An exit that costs more than it saves, or is surer than it should be, is so passed over."""
    policy = build_policy(form)
    if not isinstance(policy, ThresholdPolicy) or not policy.decides_alone or form.exit_layers is not None:
        return []
    exits = exit_logits.exits
    able = [m for j, m in enumerate(exits[:-1]) if policy.can_exit(exits, j)]
    starts = sorted({round(i) for i in np.linspace(1, len(able) - 1, _STARTS)}) if len(able) > 1 else []
    picked = [able[start:] for start in starts]
    picked += [able[start::step] for step in (2, 3) for start in range(step)]
    return [list(few) for few in dict.fromkeys(map(tuple, picked)) if few and few != tuple(able)]


def fitted(config: EarlyExitConfig | dict[str, Any], exit_logits: ExitLogits) -> EarlyExitConfig:
    """`config`, with its parameters fitted on these exits where its policy has to be."""
    config = EarlyExitConfig.of(config)
    policy = policy_class(config)
    if not policy.needs_fit:
        return config
    reference = best_exit(exit_logits, config.min_exit or 0)
    return policy.fit(config, exit_logits.history(), exit_logits.labels, reference)


def best_exit(exit_logits: ExitLogits, min_exit: int = 0) -> int:
    """Block number of the exit from `min_exit` on that is best on this data: the most often right (regression: the
    closest); without labels, the last."""
    if exit_logits.labels is None:
        return exit_logits.exits[-1]
    scores = exit_scores(exit_logits, problem_of(exit_logits.kind).error_metric)
    able = {m: s for m, s in zip(scores.exit_layers, scores.per_exit, strict=True) if m >= min_exit}
    return max(able, key=lambda m: able[m], default=exit_logits.exits[-1])


def settings(
    family: EarlyExitConfig, history: ExitHistory, count: int, units: Units | None = None
) -> list[tuple[EarlyExitConfig, Array]]:
    """At most `count` configs of one family, slow to fast, each with the blocks [N] at which its rows stop. Only
    thresholds that the data can tell apart are taken, evenly spread over the speed-ups that they give (of `units`,
    where these are not the rows). A policy that has no threshold, or a given one, has the settings of its `grid`."""
    policy = build_policy(family)
    grid = policy.grid(history.exits, history.problem_type)
    if grid is not None:
        return [(config, build_policy(config).replay_history(history)) for config in grid]
    policy = cast(ThresholdPolicy, policy)
    policy.check(history.exits, history.num_labels, history.problem_type)
    scores = np.minimum.accumulate(decided_scores(policy, history), axis=0)  # [E-1, N], below tau: stopped by exit j
    found = []
    leaves = scores if units is None else units.largest(scores)  # a text leaves once all of its tokens may stop
    for tau in _thresholds(leaves, policy.stops_above, history, count):
        config = replace(family, threshold=tau)
        found.append((config, _stops(cast(ThresholdPolicy, build_policy(config)), scores, history)))
    return found


def _thresholds(scores: Array, stops_above: bool, history: ExitHistory, count: int) -> list[float]:
    """Thresholds in the unit of the score, from few stops to many."""
    values = np.unique(scores[np.isfinite(scores)])
    if not len(values):
        return []
    if len(values) > 2000:
        values = values[np.linspace(0, len(values) - 1, 2000).astype(int)]
    above = np.append(values[1:], values[-1] + np.float32(1e-3) + abs(values[-1]) * np.float32(1e-3))
    taus = (values + above) / 2  # halfway to the next value that was seen: no row lies on the threshold
    gaps = np.diff(np.array(history.exits, dtype=np.float64))
    saved = sum(gap * np.searchsorted(np.sort(row), taus) for gap, row in zip(gaps, scores, strict=True))
    wanted = np.linspace(saved.min(), saved.max(), count)
    chosen = sorted({int(np.abs(saved - goal).argmin()) for goal in wanted})
    sign = -1.0 if stops_above else 1.0
    return [sign * float(taus[i]) for i in chosen]


def decided_scores(policy: ThresholdPolicy, history: ExitHistory) -> Array:
    """[E-1, N]: the score of a row at each exit but the last; infinity where it cannot stop. A confidence counts as
    its negative."""
    sign = np.float32(-1.0 if policy.stops_above else 1.0)
    scores = np.full((len(history.exits) - 1, history.rows), np.inf, dtype=np.float32)
    for j in range(len(scores)):
        if policy.can_exit(history.exits, j):
            scores[j] = np.where(policy.trusts(history, j), sign * policy.score(history, j), np.inf)
    return scores


def _stops(policy: ThresholdPolicy, scores: Array, history: ExitHistory) -> Array:
    """[N]: what `policy.replay_history` gives, from scores that all thresholds share."""
    tau = np.float32(policy.threshold(history.num_labels, history.problem_type))
    going = scores > -tau if policy.stops_above else scores >= tau  # [E-1, N], True down to the exit that answers
    index = going.sum(axis=0)
    cap = policy.max_exit
    if cap is not None:
        index = np.minimum(index, max(j for j, m in enumerate(history.exits) if m <= cap))
    return np.array(history.exits)[index]
