"""Forms of exits on one frozen backbone, by their titles: what each is, and its runs in a store."""

from __future__ import annotations

from typing import Any

import numpy as np

from badge_peft.evaluation import ExitLogits
from paper_grid.records import Place, Record, by_seed
from paper_grid.store import Store

JOINT, PLAIN, CARRY = "JT", "BADGE", "BADGE + carry"
_CARRY = {"carry": "logits"}
_ATTENTION = {"exit_type": "residual_mha"}
_EXIT_0 = {"exit_0": True}
#: Title -> method, and fields of the adapter on top of the method's.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    JOINT: ("joint", {}),
    PLAIN: ("badge", {}),
    CARRY: ("badge", _CARRY),
    "BADGE + carry + exit 0": ("badge", _CARRY | _EXIT_0),
    "BADGE + carry, linear weights": ("badge", _CARRY | {"exit_weights": "linear"}),
    "BADGE + carry + distillation": ("badge_distilled", _CARRY),
    "BADGE + carry + distillation, T = 2": ("badge_distilled_soft", _CARRY),
    "BADGE + carry, r = 64": ("badge", _CARRY | {"r": 64}),
    "BADGE + carry, first token": ("badge", _CARRY | {"exit_pooling": "cls"}),
    "BADGE + attention": ("badge", _ATTENTION),
    "BADGE + carry + attention": ("badge", _CARRY | _ATTENTION),
    "BADGE + carry + attention + exit 0": ("badge", _CARRY | _ATTENTION | _EXIT_0),
    "JT + carry": ("joint", _CARRY),
    "JT + carry + attention": ("joint", _CARRY | _ATTENTION),
    "2ST": ("two_stage", {}),
    "2ST + carry": ("two_stage", _CARRY),
    "ALT": ("alternating", {}),
    "ALT + carry": ("alternating", _CARRY),
    "GPF": ("past_future", {}),
    "GPF + carry": ("past_future", _CARRY),
    "GradEquil": ("gradient_equilibrium", {}),
}
COMPARED = (
    *((PLAIN, rival) for rival in (JOINT, "2ST", "ALT", "GPF")),
    (CARRY, PLAIN),
    ("BADGE + carry + exit 0", CARRY),
    ("BADGE + carry + exit 0", PLAIN),
    *((form, CARRY) for form in FORMS if form.startswith((f"{CARRY}, ", f"{CARRY} + distillation"))),
    ("BADGE + attention", PLAIN),
    ("BADGE + carry + attention", PLAIN),
    ("BADGE + carry + attention + exit 0", "BADGE + carry + attention"),
    ("BADGE + carry + attention + exit 0", PLAIN),
    *((f"{rival} + carry", rival) for rival in (JOINT, "2ST", "ALT", "GPF")),
    *((form, PLAIN) for form in ("JT + carry", "JT + carry + attention")),
)
#: Forms whose early answers are looked at.
EARLY = (JOINT, PLAIN, CARRY, *(form for form in FORMS if form.endswith((" exit 0", f"{CARRY} + attention"))))


def is_of(record: Record, form: str, place: Place) -> bool:
    """Whether a run on this place is one of the form."""
    return (record.method, record.variant) == FORMS[form] and record.place == place


def records_of(records: list[Record], form: str, place: Place) -> list[Record]:
    """Its runs on a task, by seed."""
    return sorted((r for r in records if is_of(r, form, place)), key=lambda r: r.seed)


def scores_of(records: list[Record], form: str, place: Place, what: str) -> dict[int, float]:
    """Seed -> test score."""
    return by_seed(records, lambda r: is_of(r, form, place), what)


def logits_of(records: list[Record], form: str, place: Place, store: Store) -> dict[int, ExitLogits]:
    """Seed -> stored logits of the test rows."""
    return {r.seed: store.logits(r.settled, "test") for r in records_of(records, form, place)}


def mean(values: Any) -> float:
    """NaN for none."""
    return float(np.mean(list(values))) if values else float("nan")
