"""Exit rules to test with, thresholds that rounding cannot reach, and what a model's own blocks compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory, as_history
from badge_peft.early_exit.policies import POLICIES, build_policy
from badge_peft.early_exit.policies.agreement import features
from badge_peft.early_exit.policies.threshold import ThresholdPolicy

from .reference import SINGLE

MARGIN = 2e-4

NAMES = sorted(set(POLICIES) - {"top_k"})  # whose rows depend on one another: test_ranking_policy.py
ON_LOGITS = sorted(set(NAMES) - {"learned"})  # these read logits and nothing else
NO_REGRESSION = ("entropy", "max_prob", "confident_patience")


def fields_of(name: str, exits: Sequence[int], num_labels: int, problem_type: str) -> dict[str, Any]:
    """What a policy needs beyond its name to work on a model with these exits."""
    if name == "fixed_depth":
        return {"policy": name, "depth": exits[len(exits) // 2]}
    if name == "agreement":
        return {"policy": name, "parameters": agreement_parameters(exits, num_labels, problem_type)}
    return {"policy": name}


def agreement_parameters(exits: Sequence[int], num_labels: int, problem_type: str) -> dict[str, Any]:
    """As `calibrate` writes them, with random numbers of both signs."""
    rng = np.random.default_rng(0)
    zeros = ExitHistory.of(np.zeros((1, len(exits), num_labels), np.float32), exits, problem_type)
    widths = [features(zeros, j).shape[1] for j in range(len(exits))]
    return {
        "exits": list(exits),
        "coefficients": [rng.normal(size=width).tolist() for width in widths],
        "intercepts": [0.5] * len(exits),
        "problem_type": problem_type,
        "reference": exits[-1],
    }


RULES: list[dict[str, Any]] = [
    *({"divergence": kind, "window": window} for kind in ("ce", "kl", "js") for window in ("all", "consecutive")),
    {"divergence": "ce", "patience": 2},
    {"divergence": "ce", "decide_every": 2},
    {"policy": "entropy", "decide_every": 2, "min_exit": 2},
    {"divergence": "label"},
    {"policy": "patience", "patience": 1},
    {"policy": "fixed_depth", "depth": 0},
    *({"policy": name} for name in NAMES if name not in ("divergence", "fixed_depth")),
]


def by_label(rule: dict[str, Any]) -> bool:
    """Whether a rule compares labels."""
    return rule.get("divergence") == "label" or rule.get("policy") == "patience"


def labels_are_safe(logits: Tensor) -> bool:
    """Whether no label of [N, E, K] hangs on less than `MARGIN`."""
    top = logits.topk(2, dim=-1).values
    return bool((top[..., 0] - top[..., 1]).min() > MARGIN)


def with_threshold(
    rule: dict[str, Any], logits: Tensor, exits: list[int], share: float, doubts: Tensor | None = None
) -> dict[str, Any]:
    """`rule` with a threshold in the middle of a gap between the signals that these logits [N, E, K] really give: the
    widest gap near the quantile `share`. Numbers that differ by rounding then lie on the same side of it."""
    if rule.get("policy") == "fixed_depth":
        return {**rule, "depth": exits[int(share * len(exits))]}
    rule = {**rule, **fields_of(rule.get("policy", "divergence"), exits, logits.shape[-1], SINGLE)}
    policy = build_policy(rule)
    if not isinstance(policy, ThresholdPolicy):
        return rule
    if by_label(rule):
        assert labels_are_safe(logits)
        return {**rule, "threshold": 0.5}
    history = as_history(logits, exits, SINGLE, doubts)
    signals = np.concatenate([policy.score(history, j) for j in range(len(exits) - 1)] or [np.zeros(0)])
    signals = np.sort(signals[np.isfinite(signals)])
    if len(signals) < 2:
        return {**rule, "threshold": 0.5}
    gaps = np.diff(signals)
    place = np.abs(np.arange(len(gaps)) / len(gaps) - share)
    for reach in (0.1, 0.3, 1.0):
        best = np.where(place <= reach, gaps, 0).argmax()
        if gaps[best] > MARGIN:
            break
    else:  # they are all the same
        return {**rule, "threshold": float(signals[-1]) + 0.1}
    return {**rule, "threshold": float(signals[best] + signals[best + 1]) / 2}


def mixed_rule(logits: Tensor, exits: list[int]) -> dict[str, Any]:
    """A rule by which some rows of these logits stop early and others never: tau lies between the smallest entropy of
    one row and the smallest entropy of another."""
    policy = build_policy(policy="entropy")
    history = as_history(logits, exits, SINGLE)
    signals = np.stack([policy.score(history, j) for j in range(len(exits) - 1)])  # [E - 1, N]
    best = signals.min(axis=0)
    between = np.sort(signals[(signals >= best.min()) & (signals <= best.max())])
    gaps = np.diff(between)
    widest = gaps.argmax()
    assert gaps[widest] > MARGIN
    return {"policy": "entropy", "threshold": float(between[widest] + between[widest + 1]) / 2}


def answers(logits: Tensor, exits: list[int], exit_layer: Tensor) -> Tensor:
    """[B, K]: of [B, E, K], the logits of the exit at which each row stops."""
    index = torch.tensor([exits.index(m) for m in exit_layer.tolist()])
    return logits[torch.arange(len(index)), index]


@contextmanager
def watched_blocks(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(rows, positions) that each block of a badge model computes inside, in order."""
    found: list[tuple[int, int]] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        found.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    handles = [b.base_layer.register_forward_pre_hook(hook, with_kwargs=True) for b in model.base_model.wrapped]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_exits(model: Any) -> Iterator[list[tuple[str, int]]]:
    """(adapter, block number) of each exit of its own that a badge model computes inside, in order."""
    found: list[tuple[str, int]] = []
    handles = [
        exit_.register_forward_hook(lambda *_, key=(name, int(number)): found.append(key))
        for block in model.base_model.wrapped
        for name, head in block.badge_exit.items()
        for number, exit_ in head.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
