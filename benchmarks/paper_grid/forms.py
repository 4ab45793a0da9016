"""Forms of exits on one frozen backbone, task by task: scores, and gains of one over another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from badge_peft.evaluation import ExitLogits
from paper_grid.records import Place, Record, by_seed
from paper_grid.resampled import Gain, gains
from paper_grid.settings import Settings
from paper_grid.store import Store

Fields = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Form:
    """One column of the tables.

    Args:
        method: In `METHODS`.
        fields: Of the adapter, on top of the method's.
        title: In tables.
    """

    method: str
    fields: Fields
    title: str

    def fits(self, record: Record, place: Place) -> bool:
        """Whether a run is one of it."""
        same = record.method == self.method and record.variant == dict(self.fields)
        return same and record.place == place


JOINT = Form("joint", (), "JT")
PLAIN = Form("badge", (), "BADGE")
CARRY = Form("badge", (("carry", "logits"),), "BADGE + carry")
ATTENTION = Form("badge", (("exit_type", "residual_mha"),), "BADGE + attention")
CARRY_0 = Form("badge", (("carry", "logits"), ("exit_0", True)), "BADGE + carry + exit 0")
CARRY_ATTENTION = Form("badge", (("carry", "logits"), ("exit_type", "residual_mha")), "BADGE + carry + attention")
CARRY_ATTENTION_0 = Form(
    "badge",
    (("carry", "logits"), ("exit_0", True), ("exit_type", "residual_mha")),
    "BADGE + carry + attention + exit 0",
)
CARRY_LINEAR = Form("badge", (("carry", "logits"), ("exit_weights", "linear")), "BADGE + carry, linear weights")
CARRY_DISTILLED = Form("badge_distilled", (("carry", "logits"),), "BADGE + carry + distillation")
CARRY_DISTILLED_SOFT = Form("badge_distilled_soft", (("carry", "logits"),), "BADGE + carry + distillation, T = 2")
CARRY_WIDE = Form("badge", (("carry", "logits"), ("r", 64)), "BADGE + carry, r = 64")
CARRY_CLS = Form("badge", (("carry", "logits"), ("exit_pooling", "cls")), "BADGE + carry, first token")
JOINT_CARRY = Form("joint", (("carry", "logits"),), "JT + carry")
JOINT_CARRY_ATTENTION = Form("joint", (("carry", "logits"), ("exit_type", "residual_mha")), "JT + carry + attention")
FORMS = (
    JOINT,
    PLAIN,
    CARRY,
    CARRY_0,
    CARRY_LINEAR,
    CARRY_DISTILLED,
    CARRY_DISTILLED_SOFT,
    CARRY_WIDE,
    CARRY_CLS,
    ATTENTION,
    CARRY_ATTENTION,
    CARRY_ATTENTION_0,
    JOINT_CARRY,
    JOINT_CARRY_ATTENTION,
)
TWO_STAGE = Form("two_stage", (), "2ST")
ALTERNATING = Form("alternating", (), "ALT")
PAST_FUTURE = Form("past_future", (), "GPF")
EQUILIBRIUM = Form("gradient_equilibrium", (), "GradEquil")
TWO_STAGE_CARRY = Form("two_stage", (("carry", "logits"),), "2ST + carry")
ALTERNATING_CARRY = Form("alternating", (("carry", "logits"),), "ALT + carry")
PAST_FUTURE_CARRY = Form("past_future", (("carry", "logits"),), "GPF + carry")
OTHERS = (
    TWO_STAGE,
    TWO_STAGE_CARRY,
    ALTERNATING,
    ALTERNATING_CARRY,
    PAST_FUTURE,
    PAST_FUTURE_CARRY,
    EQUILIBRIUM,
)


def found_forms(records: list[Record], forms: tuple[Form, ...] = FORMS) -> list[Form]:
    """Those that some run is one of."""
    return [form for form in forms if any(form.fits(r, r.place) for r in records)]


def records_of(records: list[Record], form: Form, place: Place) -> list[Record]:
    """Its runs on a task, by seed."""
    return sorted((r for r in records if form.fits(r, place)), key=lambda r: r.seed)


def scores_of(records: list[Record], form: Form, place: Place, what: str) -> dict[int, float]:
    """Seed -> test score."""
    return by_seed(records, lambda r: form.fits(r, place), what)


def logits_of(records: list[Record], form: Form, place: Place, store: Store, split: str) -> dict[int, ExitLogits]:
    """Seed -> stored logits."""
    return {r.seed: store.logits(r.settled, split) for r in records_of(records, form, place)}


def gains_over(
    records: list[Record], form: Form, place: Place, store: Store, settings: Settings, over: Form = PLAIN
) -> dict[str, Gain] | None:
    """How far a form is ahead of another on one task."""
    ours, others = (logits_of(records, one, place, store, "test") for one in (form, over))
    return gains(ours, others, settings.tasks[place[0]].metric)


def mean(values: dict[int, float]) -> float:
    """Over seeds; NaN for none."""
    return float(np.mean(list(values.values()))) if values else float("nan")
