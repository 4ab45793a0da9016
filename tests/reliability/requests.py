"""Requests to one model as a service gets them, and their answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.early_exit.test_adapter_names import BASE, make
from tests.models import make_batch

NAMES = ("default", "wide", "few", "degree", "tags")
POLICIES: list[dict[str, Any]] = [
    {"policy": "divergence"},
    {"policy": "divergence", "divergence": "js", "window": "consecutive"},
    {"policy": "patience"},
    {"policy": "entropy"},
    {"policy": "max_prob"},
    {"policy": "confident_patience"},
    {"policy": "fixed_depth"},
    {"policy": "never"},
]


@dataclass(frozen=True)
class Request:
    """One call.

    Args:
        full_depth: Whether it is `model(**batch)`; else `early_exit_forward`.
        batch: `input_ids` and `attention_mask`, [B, S].
        arguments: Of `early_exit_forward`.
    """

    full_depth: bool
    batch: dict[str, Tensor]
    arguments: dict[str, Any]


def make_service(case: str = "bert") -> Any:
    """A model of four blocks with several adapters, in eval mode; the first is active."""
    return make(case, NAMES)


def draw_requests(count: int, seed: int = 0) -> list[Request]:
    """`count` requests by chance: lengths, batch sizes, sides of the padding, policies, thresholds, adapters.

    Each has a batch of its own, made of one of 500 drawn before it: equal inputs must give equal answers, however the
    calls before them ended.
    """
    draw = random.Random(seed)
    shapes = [(draw.randint(1, 9), draw.randint(3, 16), draw.choice(("left", "right")), n) for n in range(500)]
    requests = []
    for _ in range(count):
        rows, length, side, number = draw.choice(shapes)
        batch = make_batch(rows, length, number, side)
        if draw.random() < 0.2:
            requests.append(Request(True, batch, {}))
            continue
        arguments = dict(draw.choice(POLICIES))
        if arguments["policy"] == "fixed_depth":
            arguments["depth"] = draw.choice((2, 4))
        elif arguments["policy"] not in ("never", "patience"):
            arguments["threshold"] = draw.choice((0.1, 0.3, 0.5, 0.7, 0.9, 1.2, 2.0))
        if draw.random() < 0.4:
            names = [*NAMES, BASE]
            if arguments["policy"] in ("entropy", "max_prob", "confident_patience"):
                names.remove("degree")  # regression has no distribution
            arguments["adapter_names"] = [draw.choice(names) for _ in range(rows)]
        requests.append(Request(False, batch, arguments))
    return requests


def answer(model: Any, request: Request) -> tuple[Tensor, Tensor | None]:
    """Logits and exit layers of an early exit; the logits of all exits at full depth."""
    if request.full_depth:
        with torch.no_grad():
            return model(**request.batch).exit_logits, None
    out = model.early_exit_forward(**request.batch, **request.arguments)
    return out.logits, out.exit_layer


def differences(answers: list[tuple[Tensor, Tensor | None]], expected: list[tuple[Tensor, Tensor | None]]) -> int:
    """How many answers are not those expected, to the last bit."""
    wrong = 0
    for (logits, exits), (wanted, wanted_exits) in zip(answers, expected, strict=True):
        same = torch.equal(logits, wanted) and (exits is None) == (wanted_exits is None)
        if same and exits is not None and wanted_exits is not None:
            same = torch.equal(exits, wanted_exits)
        wrong += not same
    return wrong
