"""Why a row stops or goes on, in words, and what came out. Plain text, not yet escaped for a page."""

from __future__ import annotations

from collections.abc import Sequence

from badge_peft.app.evidence import Evidence
from badge_peft.app.explain import ExitStep, Explanation
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.utils.answers import spoken


def number(value: float) -> str:
    """Four digits, as many as a comparison needs to be seen."""
    return f"{value:.4g}"


def block_name(block: int, num_blocks: int) -> str:
    """`block 3`; the first and the last are named for what they are."""
    if block == 0:
        return "embeddings"
    return f"block {block}" + (" (full depth)" if block == num_blocks else "")


def why(step: ExitStep, rule: EarlyExitConfig, last: int) -> str:
    """Why the row stops at this exit, or goes on: `cnt = 1 >= t = 1: stop`.

    Args:
        step: The exit.
        rule: How the row stops.
        last: Block number of the last exit.
    """
    if rule.policy == "fixed_depth" and step.block == rule.depth and step.stops:
        return f"the rule always answers at block {rule.depth}: stop"
    if step.always:
        if step.block == last:
            return "the last exit always answers: stop"
        return f"no row goes past block {rule.max_exit} (max_exit): stop"
    if rule.policy == "fixed_depth":
        return f"the rule answers at block {rule.depth}: go on"
    if rule.policy == "never":
        return "the rule never stops early: go on"
    if not step.may_stop:
        if rule.min_exit is not None and step.block < rule.min_exit:
            return f"no row stops before block {rule.min_exit} (min_exit): go on"
        return f"the rule decides at each k-th exit only, k = {rule.decide_every} (decide_every): go on"
    assert step.evidence is not None  # what is left are rules with a number
    return f"{compared(step.evidence)}: {'stop' if step.stops else 'go on'}"


def compared(seen: Evidence) -> str:
    """The comparison that decides: `cnt = 0 < t = 1`, or `H = 0.31 ≥ tau = 0.2`."""
    if seen.count is not None and seen.patience is not None:
        sign = "≥" if seen.count >= seen.patience else "<"
        return f"{'run' if seen.in_a_row else 'cnt'} = {seen.count} {sign} t = {seen.patience}"
    value, limit = seen.measured[0].value, seen.threshold
    assert limit is not None
    sign = "≥" if seen.measured[0].passes == seen.above else "<"
    return f"{seen.symbol} = {number(value)} {sign} tau = {number(limit)}"


def reason(found: Explanation) -> str:
    """Why the row stopped where it did, in a sentence."""
    step, rule = found.answer, found.rule
    last = found.steps[-1].block
    seen = step.evidence
    if step.always or seen is None or seen.count is None:
        said = why(step, rule, last).removesuffix(": stop")
        if step.block == last and rule.policy not in ("never", "fixed_depth"):
            return f"No exit before it met the rule, and {said}."
        return f"{said[0].upper()}{said[1:]}."
    if rule.policy == "confident_patience":
        return (
            f"{_exits(seen.count)} in a row, this one the last, had an entropy below tau = {_limit(seen)} of the "
            f"largest there can be: {compared(seen)}."
        )
    near = [m for m in seen.measured if m.passes]
    if seen.in_a_row:
        what = "gave the same answer as the exit before" if seen.threshold is None else f"lay within {_within(seen)}"
        return f"{_exits(seen.count)} in a row {what}: {compared(seen)}."
    blocks = ", ".join(f"{m.block} ({seen.symbol} = {number(m.value)})" for m in near)
    what = "predicted a distribution" if found.problem_type != "regression" else "predicted a value"
    return (
        f"{_exits(seen.count, 'earlier ')} {what} closer than tau = {_limit(seen)}, "
        f"{'that of block' if len(near) == 1 else 'those of blocks'} {blocks}: {compared(seen)}."
    )


def answer(step: ExitStep, names: Sequence[str], problem_type: str) -> str:
    """What an exit says: `good (98.2%)`, `a, c (least sure label 61.0%)`, `3.42`."""
    said = spoken(step.logits, names, problem_type)
    if "value" in said:
        values = said["value"] if isinstance(said["value"], list) else [said["value"]]
        return ", ".join("not a number" if value is None else number(value) for value in values)
    sure = "not a number" if said["confidence"] is None else f"{said['confidence']:.1%}"
    if "labels" in said:
        return f"{', '.join(said['labels']) or 'no label'} (least sure label {sure})"
    return f"{said['label']} ({sure})"


def saved(found: Explanation) -> str:
    """`4 of 6 blocks saved (66.7%)`."""
    return f"{found.blocks_saved} of {found.num_blocks} blocks saved ({found.blocks_saved / found.num_blocks:.1%})"


def _limit(seen: Evidence) -> str:
    return "" if seen.threshold is None else number(seen.threshold)


def _within(seen: Evidence) -> str:
    return f"tau = {_limit(seen)} of the exit before ({seen.quantity})"


def _exits(count: int, kind: str = "") -> str:
    return f"{count} {kind}exit" + ("" if count == 1 else "s")
