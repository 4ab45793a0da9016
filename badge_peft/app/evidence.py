"""What each rule looks at when it decides: its number at an exit, the threshold, and its counter.

The numbers are those of the policy itself, from the same history; whether a row stops is never worked out here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import (
    AgreementPolicy,
    ConfidentPatiencePolicy,
    DivergencePolicy,
    EntropyPolicy,
    ExitPolicy,
    LearnedPolicy,
    MaxProbPolicy,
    PatiencePolicy,
    ThresholdPolicy,
)


@dataclass(frozen=True)
class Measured:
    """One number that a rule compares with its threshold.

    Args:
        block: Of the exit that it belongs to: the earlier exit of a divergence, else the exit itself.
        value: S(p_m, p_i) of Eq. 4, an entropy, a probability, ...
        passes: Whether it lies on the stopping side of the threshold.
    """

    block: int
    value: float
    passes: bool


@dataclass(frozen=True)
class Evidence:
    """What a rule saw at one exit.

    Args:
        quantity: What the numbers are: `divergence (ce)`, `entropy`, `largest probability`, ...
        symbol: Of the number in a formula.
        threshold: In the unit of the numbers; None for rules without one.
        above: Whether a number passes at or above the threshold, not below it.
        measured: The numbers at this exit, shallow to deep; none where there is no earlier exit to compare with.
        count: cnt_m, or the length of the unbroken run that ends here; None for rules that do not count.
        patience: t; None for rules that do not count.
        in_a_row: Whether `count` is an unbroken run.
        of_pairs: Whether the numbers lie between this exit and earlier ones, and are not its own.
    """

    quantity: str
    symbol: str
    threshold: float | None
    above: bool
    measured: tuple[Measured, ...]
    count: int | None = None
    patience: int | None = None
    in_a_row: bool = False
    of_pairs: bool = False


def quantity(policy: ExitPolicy, problem_type: str) -> tuple[str, str]:
    """The name and the symbol of what `policy` measures."""
    if isinstance(policy, DivergencePolicy):
        if problem_type == "regression":
            return "distance", "|y - y'|"
        if policy.config.divergence == "label":
            several = problem_type == "multi_label_classification"
            return ("labels that differ", "d") if several else ("another label (1) or the same (0)", "d")
        return f"divergence ({policy.config.divergence})", "S"
    if isinstance(policy, ConfidentPatiencePolicy):
        return "entropy as a share of the largest", "H"
    if isinstance(policy, EntropyPolicy):
        return "entropy", "H"
    if isinstance(policy, MaxProbPolicy):
        several = problem_type == "multi_label_classification"
        return ("probability of the least sure label" if several else "largest probability"), "p"
    if isinstance(policy, LearnedPolicy):
        return "predicted uncertainty", "u"
    if isinstance(policy, AgreementPolicy):
        if not policy.stops_above:
            return "predicted distance", "d"
        target = (policy.config.parameters or {}).get("target")
        what = "right" if target == "correct" else "full depth's"
        return f"predicted probability that the answer is {what}", "P"
    return "block", "m"


def evidence(policy: ExitPolicy, history: ExitHistory, j: int) -> Evidence | None:
    """What `policy` saw at exit j (index) of the one row in `history`.

    Returns:
        None where it looks at nothing: rules without a number, and exits that answer whatever a fitted number says.

    Raises:
        ValueError: `learned` on an adapter that has no LTE layer.
    """
    if not isinstance(policy, ThresholdPolicy):
        return None
    if isinstance(policy, DivergencePolicy):
        return _divergences(policy, history, j)
    if isinstance(policy, (AgreementPolicy, LearnedPolicy)) and policy.is_final(history.exits, j):
        return None  # nothing was fitted for an exit that nobody asks
    if isinstance(policy, ConfidentPatiencePolicy):
        return _run_of_entropies(policy, history, j)
    value = float(policy.score(history, j)[0])
    passes = bool(policy.should_exit(history, j)[0])
    return _evidence(policy, history, (Measured(history.exits[j], value, passes),))


def _divergences(policy: DivergencePolicy, history: ExitHistory, j: int) -> Evidence:
    """cnt_m of Eq. 3, or the run of adjacent agreements."""
    kind, everyone = policy.config.divergence, policy.config.window == "all"
    first = 0 if everyone else max(0, j - 1)
    values = (float(history.to(kind, j, i)[0]) for i in range(first, j))
    measured = tuple(
        Measured(history.exits[i], value, _below(policy, history, value)) for i, value in enumerate(values, first)
    )
    if everyone:
        count = sum(m.passes for m in measured)
    else:
        count = 0
        while count < j and _below(policy, history, float(history.to_previous(kind, j - count)[0])):
            count += 1
    return _evidence(policy, history, measured, count, policy.patience, not everyone)


def _run_of_entropies(policy: ConfidentPatiencePolicy, history: ExitHistory, j: int) -> Evidence:
    """How many exits in a row, up to this one, were sure enough."""
    alone = ConfidentPatiencePolicy(policy.config, patience=1)
    shares = [float(alone.score(history, i)[0]) for i in range(j + 1)]
    count = 0
    while count <= j and _below(policy, history, shares[j - count]):
        count += 1
    here = Measured(history.exits[j], shares[j], count > 0)
    return _evidence(policy, history, (here,), count, policy.patience, True)


def _below(policy: ThresholdPolicy, history: ExitHistory, value: float) -> bool:
    """As the policy compares: in float32."""
    return bool(np.float32(value) < np.float32(policy.limit(history)))


def _evidence(
    policy: ThresholdPolicy,
    history: ExitHistory,
    measured: tuple[Measured, ...],
    count: int | None = None,
    patience: int | None = None,
    in_a_row: bool = False,
) -> Evidence:
    name, symbol = quantity(policy, history.problem_type)
    counts_labels = isinstance(policy, PatiencePolicy) and history.problem_type != "regression"
    pairs = isinstance(policy, DivergencePolicy)
    limit = None if counts_labels else float(policy.limit(history))
    return Evidence(name, symbol, limit, policy.stops_above, measured, count, patience, in_a_row, pairs)
