"""What came out, in words. Plain text, not yet escaped for a page."""

from __future__ import annotations

from collections.abc import Sequence

from badge_peft.app.explain import ExitStep, Explanation
from badge_peft.early_exit.policies.evidence import number
from badge_peft.utils.problem import problem_of


def block_name(block: int, num_blocks: int) -> str:
    """`block 3`; the first and the last are named for what they are."""
    if block == 0:
        return "embeddings"
    return f"block {block}" + (" (full depth)" if block == num_blocks else "")


def answer(step: ExitStep, names: Sequence[str], problem_type: str) -> str:
    """What an exit says: `good (98.2%)`, `a, c (least sure label 61.0%)`, `3.42`."""
    said = problem_of(problem_type).format_prediction(step.logits, names)
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
