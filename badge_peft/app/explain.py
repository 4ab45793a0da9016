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

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import ExitPolicy, build_policy
from badge_peft.early_exit.policies.evidence import Evidence
from badge_peft.model import get_badge_model
from badge_peft.utils.problem import problem_of

Array = np.ndarray


@dataclass(frozen=True)
class Reading:
    """What all exits said about one row.

    Args:
        logits: [E, K] float32, shallow to deep.
        uncertainty: [E], the uncertainty that `learned` reads, where the adapter has it.
        exits: Block numbers of the E exits.
        num_blocks: M.
        problem_type: As transformers has it.
    """

    logits: Array
    uncertainty: Array | None
    exits: tuple[int, ...]
    num_blocks: int
    problem_type: str


@dataclass(frozen=True)
class ExitStep:
    """One exit, and what the rule said there.

    Args:
        block: Its number; 0 is the exit on the embeddings.
        logits: [K] float32.
        probabilities: [K], of the labels (multi-label: of each by itself); None for regression.
        evidence: What the rule looked at; None where it looks at no number.
        why: What decides here: `cnt = 1 ≥ t = 1`.
        may_stop: Whether the rule decides here: not before `min_exit`, nor between every `decide_every`-th exit.
        always: Whether every row that comes here stops, whatever the logits: the last exit, or `max_exit`.
        stops: Whether the row would stop here, had it come so far.
        answers: Whether this is the exit that answers: the first at which the row stops.
        reached: Whether the live path gets here: False behind the exit that answers.
    """

    block: int
    logits: Array
    probabilities: Array | None
    evidence: Evidence | None
    why: str
    may_stop: bool
    always: bool
    stops: bool
    answers: bool
    reached: bool


@dataclass(frozen=True)
class Explanation:
    """One row's way through the exits.

    Args:
        steps: One per exit, shallow to deep.
        rule: How it stops.
        reason: Why it stopped where it did, in a sentence.
        num_blocks: M.
        problem_type: As transformers has it.
    """

    steps: tuple[ExitStep, ...]
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
def read_exits(model: nn.Module, inputs: dict[str, Tensor]) -> Reading:
    """Runs one row through all blocks.

    Args:
        model: A PEFT model with an active BADGE adapter, in eval mode.
        inputs: As for the model, each tensor with one row.

    Raises:
        ValueError: no BADGE adapter, or more than one row.
    """
    badge = get_badge_model(model)
    config = badge.config_of()
    output = badge(**inputs)
    if len(output.exit_logits) != 1:
        raise ValueError(f"one row at a time can be explained, got {len(output.exit_logits)}.")
    uncertainty = output.exit_uncertainty
    return Reading(
        output.exit_logits[0].float().cpu().numpy(),
        None if uncertainty is None else uncertainty[0].float().cpu().numpy(),
        tuple(badge.exit_layers()),
        badge.num_blocks,
        config.resolved_problem_type,
    )


def explain(reading: Reading, rule: EarlyExitConfig | dict[str, Any] | None = None, **fields: Any) -> Explanation:
    """How `rule` decides at each exit of `reading`.

    Args:
        reading: From `read_exits`.
        rule: None takes the defaults of `EarlyExitConfig`.
        **fields: Fields of `EarlyExitConfig`, which win over `rule`.

    Raises:
        ValueError: a field has a value that is not allowed, or the rule does not suit the model.
    """
    policy = build_policy(EarlyExitConfig.of(rule, **fields))
    exits, kind = list(reading.exits), reading.problem_type
    policy.check(exits, reading.logits.shape[1], kind)
    uncertainty = None if reading.uncertainty is None else reading.uncertainty[None]
    history = ExitHistory.of(reading.logits[None], exits, kind, uncertainty)
    steps: list[ExitStep] = []
    for j in range(len(exits)):
        reached = not any(step.answers for step in steps)
        steps.append(_step(policy, history, j, reached))
    j = next(j for j, step in enumerate(steps) if step.answers)
    reason = policy.sentence(exits, j, steps[j].evidence, kind)
    return Explanation(tuple(steps), policy.config, reason, reading.num_blocks, kind)


def _step(policy: ExitPolicy, history: ExitHistory, j: int, reached: bool) -> ExitStep:
    stops = bool(policy.stops(history, j)[0])
    logits = history.logits[j, 0].copy()
    evidence = policy.evidence(history, j)
    return ExitStep(
        block=history.exits[j],
        logits=logits,
        probabilities=problem_of(history.problem_type).probabilities(logits),
        evidence=evidence,
        why=policy.why(history.exits, j, evidence),
        may_stop=policy.can_exit(history.exits, j),
        always=policy.is_final(history.exits, j),
        stops=stops,
        answers=stops and reached,
        reached=reached,
    )
