"""What the short page says of forms of exits on a frozen backbone, in numbers."""

from __future__ import annotations

from badge_peft.evaluation import exit_scores
from paper_grid.forms import (
    ALTERNATING,
    ALTERNATING_CARRY,
    ATTENTION,
    CARRY,
    CARRY_0,
    CARRY_ATTENTION,
    CARRY_ATTENTION_0,
    CARRY_CLS,
    CARRY_DISTILLED,
    CARRY_DISTILLED_SOFT,
    CARRY_LINEAR,
    CARRY_WIDE,
    JOINT,
    JOINT_CARRY,
    JOINT_CARRY_ATTENTION,
    PAST_FUTURE,
    PAST_FUTURE_CARRY,
    PLAIN,
    TWO_STAGE,
    TWO_STAGE_CARRY,
    Form,
    found_forms,
    gains_over,
    records_of,
)
from paper_grid.records import Place, Record, places
from paper_grid.resampled import Gain, gains
from paper_grid.savings import Savings
from paper_grid.settings import Settings
from paper_grid.store import Store
from paper_grid.tables import task_title

COMPARED = (
    (PLAIN, JOINT),
    (PLAIN, TWO_STAGE),
    (PLAIN, ALTERNATING),
    (PLAIN, PAST_FUTURE),
    (CARRY, PLAIN),
    (CARRY_0, CARRY),
    (CARRY_0, PLAIN),
    (CARRY_LINEAR, CARRY),
    (CARRY_DISTILLED, CARRY),
    (CARRY_DISTILLED_SOFT, CARRY),
    (CARRY_WIDE, CARRY),
    (CARRY_CLS, CARRY),
    (ATTENTION, PLAIN),
    (CARRY_ATTENTION, PLAIN),
    (CARRY_ATTENTION_0, CARRY_ATTENTION),
    (CARRY_ATTENTION_0, PLAIN),
    (JOINT_CARRY, JOINT),
    (TWO_STAGE_CARRY, TWO_STAGE),
    (ALTERNATING_CARRY, ALTERNATING),
    (PAST_FUTURE_CARRY, PAST_FUTURE),
    (JOINT_CARRY, PLAIN),
    (JOINT_CARRY_ATTENTION, PLAIN),
)
EARLY = (JOINT, PLAIN, CARRY, CARRY_0, CARRY_ATTENTION, CARRY_ATTENTION_0)  # whose early answers are looked at


class Numbers:
    """Gains of forms over others, and what their early answers save.

    Args:
        settings: The grid.
        store: Its runs.
        records: Those that are finished.

    Attributes:
        places: The tasks.
        forms: Those that some run is one of.
        compared: The pairs of `COMPARED` that share a task.
        early: The forms of `EARLY` among them.
        gained: By pair and place the gain in S-avg (`avg`), in S-best (`best`), and of early answers (`early`).
        saved_within: By form and place, for each seed the share of blocks saved within `DROP`, and points lost.
        answered: By form and place, for each seed the share of blocks saved where it should be `SHARE`, and the score
            of the answers.
    """

    def __init__(self, settings: Settings, store: Store, records: list[Record]) -> None:
        self.settings, self.store, self.records = settings, store, records
        self.places = [p for p in places(records) if p[2] == "frozen" and any(PLAIN.fits(r, p) for r in records)]
        self.forms = found_forms(records)
        self.gained: dict[tuple[Form, Form, Place], dict[str, Gain]] = {}
        for form, over in COMPARED:
            for place in self.places:
                found = gains_over(records, form, place, store, settings, over)
                if found is not None:
                    self.gained[form, over, place] = found
        self.compared = [pair for pair in COMPARED if any((*pair, p) in self.gained for p in self.places)]
        self.early = [form for form in EARLY if form in self.forms]
        self._add_early(Savings(store))

    def _add_early(self, savings: Savings) -> None:
        self.saved_within: dict[tuple[Form, Place], list[tuple[float, float]]] = {}
        self.answered: dict[tuple[Form, Place], list[tuple[float, float]]] = {}
        for place in self.places:
            answers, metric = {}, self.settings.tasks[place[0]].metric
            for form in self.early:
                mine = records_of(self.records, form, place)
                if form != JOINT:
                    self.saved_within[form, place] = [savings.within_drop(record) for record in mine]
                found = {record.seed: savings.answers(record, "share") for record in mine}
                answers[form] = {seed: one for seed, (one, _) in found.items()}
                self.answered[form, place] = [
                    (share, 100 * exit_scores(one, metric).best) for one, share in found.values()
                ]
            for form, over in self.compared:
                if form in answers and over in answers:
                    gained = gains(answers[form], answers[over], metric)
                    if gained is not None:
                        self.gained[form, over, place]["early"] = gained["avg"]

    def title(self, place: Place) -> str:
        """Of a task."""
        return task_title(self.settings, place[0])

    def gains_of(self, form: Form, over: Form, what: str) -> list[Gain]:
        """One for each task."""
        found = [self.gained.get((form, over, p), {}).get(what) for p in self.places]
        return [gain for gain in found if gain is not None]
