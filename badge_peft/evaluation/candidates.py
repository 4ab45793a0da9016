"""Which configurations a sweep or a calibration tries: for each policy, settings spread over the speed-up range."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from badge_peft.early_exit.config import DIVERGENCES, WINDOWS, EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.evaluation.agreement import best_exit, fit_agreement
from badge_peft.evaluation.exit_logits import ExitLogits

Array = np.ndarray
MAX_PATIENCE = 4  # beyond it DGE has little speed-up left; PABEE's patience is always tried whole


def policy_label(config: EarlyExitConfig) -> str:
    """A short name of a policy's variant, for curves and tables: `divergence-kl-consecutive t=2`."""
    name = config.policy
    if config.policy == "divergence":
        name += "" if config.divergence == "ce" else f"-{config.divergence}"
        name += "" if config.window == "all" else f"-{config.window}"
    distances = config.policy == "patience" and config.threshold is not None  # regression
    if (config.policy in ("divergence", "confident_patience") or distances) and config.patience is not None:
        name += f" t={config.patience}"
    return name


def families(policy: str | dict[str, Any] | EarlyExitConfig, exit_logits: ExitLogits) -> list[EarlyExitConfig]:
    """The variants of `policy` worth searching for these exits, each without its threshold.

    A name leaves the patience open; `auto` stands for every policy with every divergence and window, with and without
    a cap at the exit that is best on this data. `agreement` is fitted here.
    """
    history = exit_logits.history()
    if policy == "auto":
        found = [family for template in _every_policy(history) for family in families(template, exit_logits)]
        best = best_exit(exit_logits)
        if best == exit_logits.exits[-1]:
            return found
        capped = [EarlyExitConfig.of(f, max_exit=best) for f in found if f.max_exit is None]
        return found + capped
    if policy == "agreement":
        return [fit_agreement(exit_logits)]
    config = EarlyExitConfig.of({"policy": policy} if isinstance(policy, str) else policy)
    if config.policy == "agreement" and config.parameters is None:
        fitted = fit_agreement(exit_logits)
        cap = fitted.max_exit if config.max_exit is None else config.max_exit
        return [EarlyExitConfig.of(config, parameters=fitted.parameters, max_exit=cap)]
    steps = len(history.exits) - 1
    with_patience = ["divergence", "confident_patience"]
    if history.problem_type == "regression":  # elsewhere `settings` tries every patience
        with_patience.append("patience")
    if config.policy in with_patience and config.patience is None:
        return [EarlyExitConfig.of(config, patience=t) for t in range(1, max(1, min(MAX_PATIENCE, steps)) + 1)]
    return [config]


def settings(family: EarlyExitConfig, history: ExitHistory, count: int) -> list[tuple[EarlyExitConfig, Array]]:
    """At most `count` configs of one family, slow to fast, each with the blocks [N] at which its rows stop.

    Only thresholds that the data can tell apart are taken, evenly spread over the speed-ups that they give.
    """
    if family.policy == "fixed_depth":
        depths = reversed(within(family, history.exits))
        return [_replayed(EarlyExitConfig.of(family, depth=m), history) for m in depths]
    policy = build_policy(family)
    policy.check(history.exits, history.num_labels, history.problem_type)
    labels = family.policy == "patience" and history.problem_type != "regression"
    if labels and family.patience is None:
        patience = reversed(range(1, max(2, len(history.exits))))
        return [_replayed(EarlyExitConfig.of(family, patience=t), history) for t in patience]
    if labels or not isinstance(policy, ThresholdPolicy) or family.threshold is not None:
        return [_replayed(family, history)]
    scores = running_min_score(policy, history)  # [E-1, N]
    found = []
    for tau in _thresholds(scores, policy.stops_above, history, count):
        unit = cast(ThresholdPolicy, build_policy(family, threshold=1.0)).unit(history)
        config = replace(family, threshold=tau / unit)
        found.append((config, _stops(cast(ThresholdPolicy, build_policy(config)), scores, history)))
    return found


def within(config: EarlyExitConfig, exits: list[int]) -> list[int]:
    """The exits at which `min_exit` and `max_exit` let a row stop; where none lies between the two, the deepest up to
    `max_exit`, which is the one that answers then.

    Raises:
        ValueError: a bound lies outside of the model.
    """
    build_policy(EarlyExitConfig.of(config, policy="never")).check(exits, 1, "")
    reached = [m for m in exits if config.max_exit is None or m <= config.max_exit]
    return [m for m in reached if config.min_exit is None or m >= config.min_exit] or reached[-1:]


def _every_policy(history: ExitHistory) -> Iterable[str | dict[str, Any]]:
    regression = history.problem_type == "regression"
    divergences = ("ce",) if regression else DIVERGENCES
    yield from ({"policy": "divergence", "divergence": d, "window": w} for d in divergences for w in WINDOWS)
    yield {"policy": "patience"}
    if not regression:
        yield from ({"policy": name} for name in ("entropy", "max_prob", "confident_patience"))
    yield "agreement"
    if not np.isnan(history.uncertainty).any():
        yield {"policy": "learned"}


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


def running_min_score(policy: ThresholdPolicy, history: ExitHistory) -> Array:
    """[E-1, N]: the smallest score of a row up to each exit but the last, so that a row has stopped by exit j
    exactly where this lies below the threshold. A confidence counts as its negative."""
    sign = np.float32(-1.0 if policy.stops_above else 1.0)
    rows = []
    for j in range(len(history.exits) - 1):
        decides = policy.can_exit(history.exits, j)
        rows.append(sign * policy.score(history, j) if decides else np.full(history.rows, np.inf, dtype=np.float32))
    if not rows:
        return np.empty((0, history.rows), dtype=np.float32)
    return np.minimum.accumulate(np.stack(rows), axis=0)


def _stops(policy: ThresholdPolicy, scores: Array, history: ExitHistory) -> Array:
    """[N]: what `policy.replay_history` gives, from scores that all thresholds share."""
    tau = np.float32(policy.limit(history))
    going = scores > -tau if policy.stops_above else scores >= tau  # [E-1, N], True down to the exit that answers
    index = going.sum(axis=0)
    cap = policy.config.max_exit
    if cap is not None:
        index = np.minimum(index, max(j for j, m in enumerate(history.exits) if m <= cap))
    return np.array(history.exits)[index]


def _replayed(config: EarlyExitConfig, history: ExitHistory) -> tuple[EarlyExitConfig, Array]:
    return config, build_policy(config).replay_history(history)
