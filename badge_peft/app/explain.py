"""`explain`: one row's way through the exits, decision by decision. Nothing here knows of a page.

All exits are read in one full-depth pass, and the adapter's own policy decides on them one after the other, as the
live path does: so the exit that is named is the one of `early_exit_forward`, and the logits are its logits, bit for
bit. The exits behind it, which the live path leaves out, are what would have come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from badge_peft.app.evidence import Evidence, evidence_of, sentence, why
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.model import get_badge_model
from badge_peft.utils.problem import problem_of

Array = np.ndarray


@dataclass(frozen=True)
class ExitStep:
    """One exit, and what the rule said there."""

    block: int  # 0: on the embeddings
    logits: Array  # [K] float32
    probabilities: Array | None  # [K]; None for regression
    evidence: Evidence | None  # None: it looks at no number
    why: str  # what decides here: `cnt = 1 ≥ t = 1`
    stops: bool  # had the row come so far
    answers: bool  # the first that stops
    reached: bool  # False behind the one that answers


@dataclass(frozen=True)
class Explanation:
    """One row's way through the exits."""

    steps: tuple[ExitStep, ...]  # shallow to deep
    rule: EarlyExitConfig
    reason: str
    num_blocks: int
    problem_type: str

    @property
    def answer(self) -> ExitStep:
        """The exit that answers."""
        return next(step for step in self.steps if step.answers)

    @property
    def exit_layer(self) -> int:
        """The block that answers, as in `EarlyExitOutput`."""
        return self.answer.block

    @property
    def blocks_saved(self) -> int:
        """How many blocks are not computed."""
        return self.num_blocks - self.exit_layer


@torch.no_grad()
def read_exits(model: nn.Module, inputs: dict[str, Tensor]) -> ExitLogits:
    """Runs one row through all blocks."""
    badge = get_badge_model(model)
    output = badge(**inputs)
    kind = badge.config_of().resolved_problem_type
    return ExitLogits(output.exit_logits, None, badge.exit_layers(), kind, badge.num_blocks, output.exit_uncertainty)


def explain(
    exit_logits: ExitLogits, rule: EarlyExitConfig | dict[str, Any] | None = None, **fields: Any
) -> Explanation:
    """How `rule` decides at each exit of a row."""
    if len(exit_logits) != 1:
        raise ValueError(f"one row at a time can be explained, got {len(exit_logits)}.")
    policy = build_policy(EarlyExitConfig.of(rule, **fields))
    history = exit_logits.history()
    exits = history.exits
    kind = history.problem_type
    policy.check(exits, history.num_labels, kind)
    stops = [bool(policy.stops(history, j)[0]) for j in range(len(exits))]
    answers = stops.index(True)
    evidence = [evidence_of(policy, history, j) for j in range(len(exits))]
    steps = []
    for j, block in enumerate(exits):
        logits = history.logits[j, 0]
        probabilities, reason = problem_of(kind).probabilities(logits), why(policy, exits, j, evidence[j])
        steps.append(ExitStep(block, logits, probabilities, evidence[j], reason, stops[j], j == answers, j <= answers))
    reason = sentence(policy, exits, answers, evidence[answers], kind)
    return Explanation(tuple(steps), policy.config, reason, exit_logits.depth, kind)
