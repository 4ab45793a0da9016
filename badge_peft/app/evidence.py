"""What a policy sees at an exit when it decides, in numbers and in words: for the page, which asks for it alone.

A class of policies has a function of its own where it says something of its own; a user's class is taken for the one
that it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import numpy as np

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import (
    AgreementPolicy,
    ConfidentPatiencePolicy,
    DivergencePolicy,
    EntropyPolicy,
    ExitPolicy,
    FixedDepthPolicy,
    LearnedPolicy,
    MaxProbPolicy,
    NeverPolicy,
    ThresholdPolicy,
    TopKPolicy,
)
from badge_peft.early_exit.policies.base import short
from badge_peft.early_exit.policies.fixed import UnconditionalPolicy
from badge_peft.utils.problem import problem_of


@dataclass(frozen=True)
class Measured:
    """One number that a policy compares with its threshold."""

    block: int  # of the exit that it belongs to: the earlier exit of a divergence, else the exit itself
    value: float  # a divergence, an entropy, a probability, ...
    passes: bool  # on the stopping side of the threshold


@dataclass(frozen=True)
class Evidence:
    """What a policy saw at one exit."""

    quantity: str
    symbol: str  # in a formula
    threshold: float | None  # None: the policy has none
    above: bool  # a number passes at or above the threshold
    # the numbers at this exit, shallow to deep; none where there is no earlier exit to compare with
    measured: tuple[Measured, ...]
    # cnt_m, or the length of the unbroken run that ends here; None for policies that do not count
    count: int | None = None
    patience: int | None = None  # t
    in_a_row: bool = False  # `count` is an unbroken run
    of_pairs: bool = False  # the numbers lie between this exit and earlier ones

    @property
    def comparison(self) -> str:
        """What decides, as a formula: `cnt = 0 < t = 1`, or `H = 0.31 ≥ tau = 0.2`."""
        if self.count is not None and self.patience is not None:
            sign = "≥" if self.count >= self.patience else "<"
            return f"{'run' if self.in_a_row else 'cnt'} = {self.count} {sign} t = {self.patience}"
        sign = "≥" if self.measured[0].passes == self.above else "<"
        return f"{self.symbol} = {number(self.measured[0].value)} {sign} tau = {self.limit}"

    @property
    def limit(self) -> str:
        """The threshold as it is read."""
        return "" if self.threshold is None else number(self.threshold)


def number(value: float) -> str:
    """Four digits, as many as a comparison needs to be seen."""
    return f"{value:.4g}"


def exits_in_words(count: int, kind: str = "") -> str:
    """`1 exit`, `2 earlier exits`."""
    return f"{count} {kind}exit" + ("" if count == 1 else "s")


# ------------------------------------------------------------------------------------------------- what it compares


_QUANTITIES: dict[type[ExitPolicy], tuple[str, str]] = {
    EntropyPolicy: ("entropy", "H"),
    ConfidentPatiencePolicy: ("entropy as a share of the largest", "H"),
    LearnedPolicy: ("predicted uncertainty", "u"),
}


def quantity(policy: ThresholdPolicy, problem_type: str) -> tuple[str, str]:
    """What a policy compares with its threshold, and its symbol in a formula."""
    problem = problem_of(problem_type)
    if isinstance(policy, DivergencePolicy):
        if not problem.gives_labels:
            return "distance", "|y - y'|"
        differ = "labels that differ" if problem.many_labels else "another label (1) or the same (0)"
        return (differ, "d") if policy.kind == "label" else (f"divergence ({policy.kind})", "S")
    if isinstance(policy, MaxProbPolicy):
        return "probability of the least sure label" if problem.many_labels else "largest probability", "p"
    if isinstance(policy, AgreementPolicy):
        what = "right" if policy.fitted.get("target") == "correct" else "full depth's"
        above = f"predicted probability that the answer is {what}", "P"
        return above if policy.stops_above else ("predicted distance", "d")
    known = (named for kind, named in _QUANTITIES.items() if isinstance(policy, kind))
    return next(known, (f"score of {policy.name}", "s"))


@singledispatch
def evidence_of(policy: ExitPolicy, history: ExitHistory, j: int) -> Evidence | None:
    """What the policy saw of the one row in `history` at exit j (index); None where it compares no number."""
    return None


@evidence_of.register
def _(policy: ThresholdPolicy, history: ExitHistory, j: int) -> Evidence:
    """The score, compared with the threshold."""
    value, passes = float(policy.score(history, j)[0]), bool(policy.should_exit(history, j)[0])
    return _evidence(policy, history, j, (Measured(history.exits[j], value, passes),))


@evidence_of.register
def _(policy: TopKPolicy, history: ExitHistory, j: int) -> None:
    """One row alone is compared with nothing."""


@evidence_of.register(AgreementPolicy)
@evidence_of.register(LearnedPolicy)
def _(policy: ThresholdPolicy, history: ExitHistory, j: int) -> Evidence | None:
    """None at an exit that always answers: nothing was fitted for it."""
    return None if policy.is_final(history.exits, j) else evidence_of.dispatch(ThresholdPolicy)(policy, history, j)


@evidence_of.register
def _(policy: DivergencePolicy, history: ExitHistory, j: int) -> Evidence:
    """The divergences from earlier exits, and cnt_m of Eq. 3 or the run of adjacent agreements."""
    kind, consecutive = policy.kind, policy.consecutive
    first = max(0, j - 1) if consecutive else 0
    values = (float(history.to(kind, j, i)[0]) for i in range(first, j))
    measured = tuple(
        Measured(history.exits[i], value, _passes(policy, history, value, j)) for i, value in enumerate(values, first)
    )
    count = sum(m.passes for m in measured)
    if consecutive:
        count = 0
        while count < j and _passes(policy, history, float(history.to_previous(kind, j - count)[0]), j - count):
            count += 1
    return _evidence(policy, history, j, measured, count, in_a_row=consecutive, of_pairs=True)


@evidence_of.register
def _(policy: ConfidentPatiencePolicy, history: ExitHistory, j: int) -> Evidence:
    """The exit's own entropy, and how many exits in a row, up to this one, were sure enough."""
    shares = [float(policy.share(history, history.entropy(i))[0]) for i in range(j + 1)]
    count = 0
    while count <= j and _passes(policy, history, shares[j - count], j - count):
        count += 1
    measured = (Measured(history.exits[j], shares[j], count > 0),)
    return _evidence(policy, history, j, measured, count, in_a_row=True)


def _evidence(
    policy: ThresholdPolicy,
    history: ExitHistory,
    j: int,
    measured: tuple[Measured, ...],
    count: int | None = None,
    in_a_row: bool = False,
    of_pairs: bool = False,
) -> Evidence:
    kind = history.problem_type
    limit = float(policy.threshold(history.num_labels, kind, j)) if policy.uses_threshold(kind) else None
    patience = None if count is None else policy.patience
    return Evidence(*quantity(policy, kind), limit, policy.stops_above, measured, count, patience, in_a_row, of_pairs)


def _passes(policy: ThresholdPolicy, history: ExitHistory, value: float, j: int) -> bool:
    """Whether a score of exit j counts as close or sure: compared as `should_exit` does, in float32."""
    return bool(np.float32(value) < np.float32(policy.threshold(history.num_labels, history.problem_type, j)))


# --------------------------------------------------------------------------------------------------------- in words


def why(policy: ExitPolicy, exits: Sequence[int], j: int, evidence: Evidence | None) -> str:
    """What decides about a row at exit j (index): `cnt = 1 ≥ t = 1`."""
    config, block, final = policy.config, exits[j], policy.is_final(exits, j)
    if isinstance(policy, FixedDepthPolicy) and (block == config.depth or not final):
        return f"the policy {'always ' if final else ''}answers at block {config.depth}"
    if final:
        last = j == len(exits) - 1
        return "the last exit always answers" if last else f"no row goes past block {policy.max_exit} (max_exit)"
    if isinstance(policy, NeverPolicy):
        return "the policy never stops early"
    if not policy.can_exit(exits, j):
        if config.min_exit is not None and block < config.min_exit:
            return f"no row stops before block {config.min_exit} (min_exit)"
        if config.exit_layers is not None and block not in config.exit_layers:
            return f"the policy decides at blocks {short(config.exit_layers)} only (exit_layers)"
        return f"the policy decides at each k-th exit only, k = {config.decide_every} (decide_every)"
    return f"policy {policy.name!r} has decided" if evidence is None else evidence.comparison


def sentence(policy: ExitPolicy, exits: Sequence[int], j: int, evidence: Evidence | None, problem_type: str) -> str:
    """Why a row got its answer at exit j (index)."""
    reason = why(policy, exits, j, evidence)
    if evidence is not None and evidence.count is not None and not policy.is_final(exits, j):
        if isinstance(policy, DivergencePolicy):
            return _agreement(evidence, evidence.count, problem_type)
        if isinstance(policy, ConfidentPatiencePolicy):
            return (
                f"{exits_in_words(evidence.count)} in a row, this one the last, had an entropy below tau = "
                f"{evidence.limit} of the largest there can be: {evidence.comparison}."
            )
    if j == len(exits) - 1 and not isinstance(policy, UnconditionalPolicy):
        return f"No exit before it met the policy, and {reason}."
    return f"{reason[0].upper()}{reason[1:]}."


def _agreement(evidence: Evidence, count: int, problem_type: str) -> str:
    """The exits that are near."""
    if evidence.in_a_row:
        within = f"lay within tau = {evidence.limit} of the exit before ({evidence.quantity})"
        what = "gave the same answer as the exit before" if evidence.threshold is None else within
        return f"{exits_in_words(count)} in a row {what}: {evidence.comparison}."
    near = [m for m in evidence.measured if m.passes]
    blocks = ", ".join(f"{m.block} ({evidence.symbol} = {number(m.value)})" for m in near)
    what = "predicted a distribution" if problem_of(problem_type).gives_labels else "predicted a value"
    return (
        f"{exits_in_words(count, 'earlier ')} {what} closer than tau = {evidence.limit}, "
        f"{'that of block' if len(near) == 1 else 'those of blocks'} {blocks}: {evidence.comparison}."
    )
