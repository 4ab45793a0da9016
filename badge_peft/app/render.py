"""What the page shows, as HTML: the macros of `page.html`, with the words, bars and colors that they are called with.

docs/decisions/page-html.md says why the page has HTML of its own.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from badge_peft.app.evidence import number
from badge_peft.app.explain import ExitStep, Explanation
from badge_peft.evaluation.plots import COLORS
from badge_peft.model_card import score_text
from badge_peft.utils.problem import problem_of

MOST_LABELS = 6  # bars per exit; of more labels the likeliest are shown
_REST = "#999999"


def block_name(block: int, num_blocks: int) -> str:
    """`block 3`; the first and the last are named for what they are."""
    if block == 0:
        return "embeddings"
    return f"block {block}" + (" (full depth)" if block == num_blocks else "")


_environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
_environment.globals.update(block_name=block_name, number=number, percent="{:.1%}".format, score=score_text)
#: `title`, `error`, `hint`, `explanation`, `tradeoff` and `no_tradeoff`, each from its arguments to HTML.
macros: Any = _environment.get_template("page.html").module


def explanation(found: Explanation, names: Sequence[str], texts: Sequence[str], cut: str = "") -> str:
    """The answer, why it was given where it was, and each exit as it came."""
    answer = _answer(found.answer, names, found.problem_type)
    return macros.explanation(found, texts, cut, answer, _bars(found, names))


def data_url(data: bytes, kind: str) -> str:
    """An image of type `image/kind` with its data inside."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _answer(step: ExitStep, names: Sequence[str], problem_type: str) -> str:
    """What an exit says: `good (98.2%)`, `a, c (least sure label 61.0%)`, `3.42`."""
    said = problem_of(problem_type).format_prediction(step.logits, names)
    if "value" in said:
        return ", ".join(map(number, step.logits))
    sure = "not a number" if said["score"] is None else f"{said['score']:.1%}"
    if "labels" in said:
        return f"{', '.join(said['labels']) or 'no label'} (least sure label {sure})"
    return f"{said['label']} ({sure})"


def _bars(found: Explanation, names: Sequence[str]) -> list[list[tuple[str, float, str, str]]]:
    """Of each exit its bars: label, width in per cent, color and number. A bar for each label, or for the likeliest at
    any exit, in the order of their numbers; regression has each value on the scale of all exits' values, so that
    their moves are seen."""
    problem = problem_of(found.problem_type)
    values = np.stack([s.logits if s.probabilities is None else s.probabilities for s in found.steps])  # [E, K]
    shown = list(range(len(names)))
    shares = values
    said: Callable[[float], str] = "{:.1%}".format
    if not problem.gives_labels:
        shares = 0.02 + 0.98 * (values - values.min()) / (np.ptp(values) or 1.0)
        said = number
    elif len(names) > MOST_LABELS:
        shown = sorted(np.argsort(-values.max(axis=0), kind="stable")[: MOST_LABELS - 1].tolist())
    exits = []
    for row, share in zip(values, shares, strict=True):
        bars = [(names[k], _width(share[k]), COLORS[i % len(COLORS)], said(row[k])) for i, k in enumerate(shown)]
        if len(shown) < len(names):
            rest = row.sum() - row[shown].sum()
            more = f"{len(names) - len(shown)} more"
            # several labels' probabilities add up to nothing
            bars.append((more, 0.0, _REST, "") if problem.many_labels else (more, _width(rest), _REST, f"{rest:.1%}"))
        exits.append(bars)
    return exits


def _width(share: float) -> float:
    return 100 * min(max(float(share), 0.0), 1.0) if np.isfinite(share) else 0.0
