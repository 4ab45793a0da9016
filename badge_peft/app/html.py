"""An explanation as HTML. Whatever comes from a user or an adapter, texts and names of labels, is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import numpy as np

from badge_peft.app import words
from badge_peft.app.explain import ExitStep, Explanation
from badge_peft.app.style import STYLE
from badge_peft.early_exit.policies.evidence import Evidence, number
from badge_peft.utils.problem import problem_of

MOST_LABELS = 6  # bars per exit; of more labels the likeliest are shown

# Okabe and Ito's colors, told apart with any color vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#999999"


def title(adapter: str) -> str:
    """The head of the page."""
    return f"<h2>Where does a text stop, and why?</h2><div>Adapter: <code>{escape(adapter)}</code></div>"


def error(message: str) -> str:
    """Something that the user can mend."""
    return _page(f'<div class="bx-error" role="alert">{escape(message)}</div>')


def note(message: str) -> str:
    """Something to know, inside of a page."""
    return f'<div class="bx-note">{escape(message)}</div>'


def hint(message: str) -> str:
    """A page on which there is nothing yet."""
    return _page(hint_line(message))


def hint_line(message: str) -> str:
    """A quiet line, inside of a page."""
    return f'<div class="bx-text">{escape(message)}</div>'


def command(what: str, line: str) -> str:
    """A command to type, and what it is for."""
    return f'{hint_line(what)}<pre class="bx-command"><code>{escape(line)}</code></pre>'


def explanation(
    found: Explanation, names: Sequence[str], text: str, pair: str | None, notes: Sequence[str] = ()
) -> str:
    """The answer, why it was given where it was, and each exit as it came.

    Args:
        found: From `explain`.
        names: Of the labels, by number.
        text: What was read.
        pair: The second text, where there is one.
        notes: Shown above the exits.
    """
    kind = found.problem_type
    cells = (
        ("answer", "bx-answer", words.answer(found.answer, names, kind)),
        ("stopped at", "bx-stop", words.block_name(found.exit_layer, found.num_blocks)),
        ("saved", "bx-saved", words.saved(found)),
    )
    top = "".join(f'<div><span>{what}</span><b class="{name}">{escape(said)}</b></div>' for what, name, said in cells)
    texts = "".join(f'<div class="bx-text">“{escape(t)}”</div>' for t in (text, pair) if t)
    shown = _shown(found)
    rows = "".join(_exit(found, step, names, shown) for step in found.steps)
    reason = f'<div class="bx-reason">{escape(found.reason)}</div>'
    return _page(f'{texts}<div class="bx-top">{top}</div>{reason}{"".join(map(note, notes))}{rows}')


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def picture(data: bytes, kind: str, alternative: str) -> str:
    """An image of type `image/kind` with its data inside."""
    coded = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{coded}" alt="{escape(alternative)}" style="max-width: 100%">'


def page(*parts: str) -> str:
    """Parts that are HTML already, as one."""
    return _page("".join(parts))


def _page(inner: str) -> str:
    return f'{STYLE}<div class="bx">{inner}</div>'


def _exit(found: Explanation, step: ExitStep, names: Sequence[str], shown: Sequence[int]) -> str:
    state = "answers" if step.answers else "reached" if step.reached else "behind"
    tag = {"answers": "answers", "reached": "goes on", "behind": "not computed"}[state]
    name, _, depth = words.block_name(step.block, found.num_blocks).partition(" (")
    depth = f"<small>{escape(depth.rstrip(')'))}</small>" if depth else ""
    bars = _values(found, step, names) if step.probabilities is None else _bars(found, step, names, shown)
    return (
        f'<div class="bx-exit {state}" data-block="{step.block}"><div class="bx-name"><b>{escape(name)}</b>{depth}'
        f'<span class="bx-tag">{tag}</span></div><div>{bars}</div><div class="bx-why">{_why(step)}</div></div>'
    )


def _why(step: ExitStep) -> str:
    said, seen = f"{step.why}: {'stop' if step.stops else 'go on'}", step.evidence
    if seen is None:
        return f"<b>{escape(said)}</b>"
    dots = ""
    if seen.count is not None and seen.patience is not None:
        full = min(seen.count, seen.patience)
        label = f"counter {seen.count} of t = {seen.patience}"
        dots = f'<span class="bx-dots" title="{label}">{"●" * full}{"○" * (seen.patience - full)}</span>'
    limit = "" if seen.threshold is None else f", tau = {number(seen.threshold)}"
    return f"<b>{escape(said)}{dots}</b><div>{escape(seen.quantity)}{limit}</div><div>{_chips(seen)}</div>"


def _chips(seen: Evidence) -> str:
    """The numbers that were compared with the threshold; those that passed are marked."""
    if not seen.measured:
        return "no earlier exit to compare with"
    return "".join(
        f'<span class="bx-chip{" yes" if m.passes else ""}">'
        f"{f'to {m.block}: ' if seen.of_pairs else ''}{number(m.value)}</span>"
        for m in seen.measured
    )


def _shown(found: Explanation) -> list[int]:
    """The labels that get a bar: all, or the likeliest at any exit, in the order of their numbers."""
    if found.answer.probabilities is None:
        return []
    every = [step.probabilities for step in found.steps if step.probabilities is not None]
    likeliest = np.stack(every).max(axis=0)
    if len(likeliest) <= MOST_LABELS:
        return list(range(len(likeliest)))
    return sorted(np.argsort(-likeliest, kind="stable")[: MOST_LABELS - 1].tolist())


def _bars(found: Explanation, step: ExitStep, names: Sequence[str], shown: Sequence[int]) -> str:
    assert step.probabilities is not None
    p = step.probabilities
    bars = [_bar(names[k], float(p[k]), COLORS[i % len(COLORS)], f"{p[k]:.1%}") for i, k in enumerate(shown)]
    left = len(p) - len(shown)
    if left:
        rest = float(p.sum() - p[list(shown)].sum())
        several = problem_of(found.problem_type).many_labels  # whose probabilities add up to nothing
        bars.append(_bar(f"{left} more", 0.0 if several else rest, _GREY, "" if several else f"{rest:.1%}"))
    return "".join(bars)


def _values(found: Explanation, step: ExitStep, names: Sequence[str]) -> str:
    """Regression: each value on the scale of all exits' values, so that their moves are seen."""
    every = np.stack([s.logits for s in found.steps])
    low, high = float(every.min()), float(every.max())
    span = (high - low) or 1.0
    return "".join(
        _bar(name, 0.02 + 0.98 * (float(value) - low) / span, COLORS[k % len(COLORS)], number(float(value)))
        for k, (name, value) in enumerate(zip(names, step.logits, strict=True))
    )


def _bar(name: str, share: float, color: str, said: str) -> str:
    width = 100 * min(max(share, 0.0), 1.0) if np.isfinite(share) else 0.0
    return (
        f'<div class="bx-bar"><span title="{escape(name)}">{escape(name)}</span>'
        f'<i style="width: {width:.1f}%; background: {color}"></i><u>{said}</u></div>'
    )
