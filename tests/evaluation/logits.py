"""Made-up logits of all exits: plausible ones, and ones that are meant to break something."""

from __future__ import annotations

import numpy as np
import torch

from badge_peft.evaluation.exit_logits import ExitLogits

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SIZES = [(SINGLE, 2), (SINGLE, 3), (SINGLE, 77), (MULTI, 6), (REGRESSION, 1)]


def plausible(
    problem_type: str = SINGLE, num_labels: int = 3, rows: int = 400, exits: int = 12, seed: int = 0
) -> ExitLogits:
    """A trained classifier: evidence for the right answer grows with depth, faster for easy rows; a few labels are
    wrong whatever one does. It has the signals of a learned exit, too."""
    rng = np.random.default_rng(seed)
    depth = np.linspace(0.1, 1.0, exits)[None, :, None]
    ease = rng.uniform(0.2, 1.5, size=(rows, 1, 1))
    noise = rng.normal(size=(rows, exits, num_labels))
    if problem_type == REGRESSION:
        truth = rng.uniform(0, 5, size=(rows, 1, 1))
        logits, labels = truth + 2 * noise * np.exp(-3 * depth * ease), truth[:, 0, 0] + 0.2 * rng.normal(size=rows)
        wrong = np.tanh(np.abs(logits[:, :, 0] - labels[:, None]))
    else:
        truth = rng.integers(0, 2, (rows, 1, num_labels)) * 2.0 - 1.0
        if problem_type == SINGLE:
            truth = np.eye(num_labels)[rng.integers(0, num_labels, rows)][:, None] * 2
        logits = truth * depth * ease * (5 + np.log(num_labels)) + noise * (1.6 - depth)
        labels = (truth[:, 0] > 0) * 1.0 if problem_type == MULTI else truth[:, 0].argmax(-1)
        flip = rng.random(rows) < 0.05
        labels[flip] = rng.permutation(labels[flip])
        said = logits > 0 if problem_type == MULTI else logits.argmax(-1)
        wrong = (said != labels[:, None]).any(-1) if problem_type == MULTI else said != labels[:, None]
    doubts = np.clip(0.7 * wrong + 0.3 * rng.random((rows, exits)), 0, 1)
    kind = torch.long if problem_type == SINGLE else torch.float32
    return ExitLogits(
        torch.tensor(logits, dtype=torch.float32),
        torch.tensor(labels).to(kind),
        problem_type=problem_type,
        uncertainty=torch.tensor(doubts, dtype=torch.float32),
    )


def strange(
    problem_type: str, num_labels: int, rows: int, exits: list[int], kind: str, seed: int, labeled: bool = True
) -> ExitLogits:
    """Logits with ties (`whole`), beyond float's exponentials (`huge`), all alike (`same`), or `plain` noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, len(exits), num_labels, generator=generator)
    logits = {
        "plain": logits,
        "whole": logits.round(),
        "huge": logits * 1e4,
        "same": logits[:1, :1].expand_as(logits).clone(),
    }[kind]
    if problem_type == REGRESSION:
        labels = torch.randn(rows, generator=generator)
    elif problem_type == MULTI:
        labels = torch.randint(0, 2, (rows, num_labels), generator=generator).float()
    else:
        labels = torch.randint(0, num_labels, (rows,), generator=generator)
    uncertainty = torch.rand(rows, len(exits), generator=generator)
    return ExitLogits(logits, labels if labeled else None, exits, problem_type, uncertainty=uncertainty)


KINDS = ("plain", "whole", "huge", "same")
EXITS = ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3], [0, 2, 5, 12], [3, 6], [6])
