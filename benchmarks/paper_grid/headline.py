"""The short page: forms of exits on a frozen backbone, against today's bypass, on all tasks of a grid."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from badge_peft.utils.files import write_json
from paper_grid.forms import (
    ALTERNATING,
    ALTERNATING_CARRY,
    ATTENTION,
    BOTH,
    CANDIDATES,
    CARRY,
    CARRY_ATTENTION,
    DROP,
    EQUILIBRIUM,
    JOINT,
    JOINT_CARRY,
    JOINT_CARRY_ATTENTION,
    LADDER,
    OTHERS,
    PAST_FUTURE,
    PLAIN,
    STATES,
    TWO_STAGE,
    TWO_STAGE_CARRY,
    Form,
    Saved,
    found_forms,
    gains_over,
    mean,
    saved_by,
    scores_of,
)
from paper_grid.gains_page import gains_page
from paper_grid.records import Place, Record, gather, places
from paper_grid.resampled import Gain
from paper_grid.settings import Settings
from paper_grid.store import Store
from paper_grid.tables import markdown, task_title, title_of

COMPARED = (
    (PLAIN, JOINT),
    (PLAIN, TWO_STAGE),
    (PLAIN, ALTERNATING),
    (PLAIN, PAST_FUTURE),
    (CARRY, PLAIN),
    (STATES, PLAIN),
    (LADDER, PLAIN),
    (BOTH, PLAIN),
    (ATTENTION, PLAIN),
    (CARRY_ATTENTION, PLAIN),
    (JOINT_CARRY, JOINT),
    (TWO_STAGE_CARRY, TWO_STAGE),
    (ALTERNATING_CARRY, ALTERNATING),
    (JOINT_CARRY, PLAIN),
    (JOINT_CARRY_ATTENTION, PLAIN),
)
GAIN, ENOUGH = 1.0, 5  # points, on so many tasks
SAVED, SAVED_TASKS, INTENTS = 0.70, 4, 0.85
INTENT_TASKS = ("banking77", "clinc150")


def write_headline(settings: Settings, store: Store, docs: Path, picture: Path | None, config: str) -> list[Path]:
    """Writes the page, and the picture of the first task.

    Raises:
        ValueError: the store holds no run of a form.
    """
    records, missing = gather(settings, store)
    if not any(PLAIN.fits(r, r.place) for r in records):
        raise ValueError(f"{store.root} holds no run of {PLAIN.title}: start with the command `run`.")
    numbers = Numbers(settings, store, records)
    name = Path(config).stem.removeprefix("paper_")
    by_task = docs.parent / "paper" / f"{name}-gains.md"
    written = [docs, by_task]
    sections = [
        f"# {settings.title}",
        numbers.summary(),
        numbers.scores(),
        numbers.saved(),
        numbers.targets(),
        numbers.made(config, name, len(missing), docs, picture),
    ]
    if picture is not None:
        from paper_grid.picture import draw_forms

        draw_forms(settings, records, store, numbers.places[0], (PLAIN, numbers.candidate), picture)
        written.append(picture)
    by_task.parent.mkdir(parents=True, exist_ok=True)
    by_task.write_text(gains_page(settings, numbers.gained, numbers.compared, numbers.places), encoding="utf-8")
    docs.write_text("\n\n".join(section.strip() for section in sections) + "\n", encoding="utf-8")
    return written


class Numbers:
    """All that the page says.

    Args:
        settings: The grid.
        store: Its runs.
        records: Those that are finished.
    """

    def __init__(self, settings: Settings, store: Store, records: list[Record]) -> None:
        self.settings, self.store, self.records = settings, store, records
        self.places = [p for p in places(records) if p[2] == "frozen" and any(PLAIN.fits(r, p) for r in records)]
        self.forms = found_forms(records)
        self.candidate = next((form for form in CANDIDATES if form in self.forms), PLAIN)
        self.gained: dict[tuple[Form, Form, Place], dict[str, Gain]] = {}
        for form, over in COMPARED:
            for place in self.places:
                found = gains_over(records, form, place, store, settings, over)
                if found is not None:
                    self.gained[form, over, place] = found
        self.compared = [pair for pair in COMPARED if any((*pair, p) in self.gained for p in self.places)]
        self._saved = self._saved_blocks()

    def _saved_blocks(self) -> dict[str, dict[str, Saved]]:
        """By form and task, of the first seed; calibrations take a while, so they are kept beside the runs."""
        path = self.store.root / "saved.json"
        kept: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
        found: dict[str, dict[str, Saved]] = {}
        for form, place in product((PLAIN, self.candidate), self.places):
            mine = [r for r in self.records if form.fits(r, place)]
            for record in sorted(mine, key=lambda r: r.seed)[:1]:
                key = record.result["key"]
                if key not in kept:
                    kept[key] = list(saved_by(record, self.store))
                    write_json(path, kept)
                one = found.setdefault(form.title, {}).setdefault(place[0], Saved({}, {}))
                one.saved[record.seed], one.drop[record.seed] = kept[key]
        return found

    def title(self, place: Place) -> str:
        """Of a task."""
        return task_title(self.settings, place[0])

    def gains_of(self, form: Form, over: Form, what: str) -> list[Gain]:
        """One for each task."""
        return [self.gained[form, over, p][what] for p in self.places if (form, over, p) in self.gained]

    def summary(self) -> str:
        """What came out, in a few sentences."""
        backbones = ", ".join(dict.fromkeys(title_of(self.settings, p[1]) for p in self.places))
        rows = []
        for form, over in self.compared:
            cells = []
            for what in ("avg", "best"):
                found = self.gains_of(form, over, what)
                above, below = sum(g.low > 0 for g in found), sum(g.high < 0 for g in found)
                cells.append(f"{sum(g.mean for g in found) / len(found):+.1f}; above 0 on {above}, below on {below}")
            rows.append([f"{form.title} over {over.title}", *cells, str(len(found))])
        return f"""Exits on a frozen {backbones}: what forms of them gain, the mean over tasks in points, and on
how many tasks the paired 95% interval lies above or below zero. BADGE is the plain bypass, JT has none; what
`carry` and `ladder` do:
[exits that build on one another](../choosing.md#exits-that-build-on-one-another-carry-ladder). Attention is
[`exit_type="residual_mha"`](../choosing.md#exit-type-exit_type).

{markdown(["", "S-avg", "S-best", "tasks"], rows)}"""

    def scores(self) -> str:
        """S-avg / S-best of all forms."""
        forms = [*self.forms, *found_forms(self.records, OTHERS)]
        rows = []
        for form in forms:
            cells = []
            for place in self.places:
                avg, best = (scores_of(self.records, form, place, what) for what in ("avg", "best"))
                cells.append(f"{mean(avg):.1f} / {mean(best):.1f}" if avg else "-")
            counts = {len(scores_of(self.records, form, place, "avg")) for place in self.places} - {0}
            rows.append([f"{form.title} ({'-'.join(map(str, sorted(counts)))})", *cells])
        header = ["S-avg / S-best (seeds)", *map(self.title, self.places)]
        same = self._same_as_joint()
        return "## Scores on test data, mean over seeds\n\n" + markdown(header, rows) + (f"\n{same}" if same else "")

    def _same_as_joint(self) -> str:
        """GradEquil rescales what reaches the blocks, and frozen ones receive nothing."""
        ours, others = (
            [scores_of(self.records, form, p, "avg") for p in self.places] for form in (JOINT, EQUILIBRIUM)
        )
        far = [
            abs(a[seed] - b[seed]) for a, b in zip(ours, others, strict=True) for seed in sorted(a.keys() & b.keys())
        ]
        if not far:
            return ""
        return (
            f"GradEquil is JT here, since a frozen block takes no gradient that could be rescaled: in {len(far)} runs "
            f"of each, S-avg differs by at most {max(far):.2f} points, the rounding of stored states."
        )

    def saved(self) -> str:
        """Blocks saved within half a point."""
        rows = []
        for place in self.places:
            cells = []
            for form in (PLAIN, self.candidate):
                one = self._saved.get(form.title, {}).get(place[0])
                cells += [f"{mean(one.saved):.0%}", f"{mean(one.drop):+.1f}"] if one else ["-", "-"]
            held = next(r.result["data"]["rows"]["validation"] for r in self.records if r.place == place)
            rows.append([self.title(place), str(held), *cells])
        header = ["task", "validation rows"]
        header += [text for form in (PLAIN, self.candidate) for text in (f"{form.title}: saved", "drop")]
        note = f"""`calibrate(policy="auto", max_score_drop={DROP})` on validation rows, its setting on test rows, one
seed: the share of the blocks saved, and the points lost against the exit that is best on validation rows. A few
hundred validation rows cannot show that half a point is kept
([what is taken then](../calibration.md#what-a-drop-is))."""
        return f"## Blocks saved for half a point\n\n{note}\n\n{markdown(header, rows)}"

    def targets(self) -> str:
        """Reached or missed."""
        rows = []
        for what, name in (("avg", "S-avg"), ("best", "S-best")):
            found = self.gains_of(self.candidate, PLAIN, what)
            count = sum(g.low > 0 and g.mean >= GAIN for g in found)
            goal = f"{name} {GAIN:+.1f}, interval above 0, on {ENOUGH} tasks"
            rows.append([goal, f"{count} of {len(found)}", _word(count >= ENOUGH)])
        saved = {task: mean(one.saved) for task, one in self._saved.get(self.candidate.title, {}).items()}
        many = sum(share >= SAVED for share in saved.values())
        rows.append(
            [
                f"{SAVED:.0%} of the blocks saved for half a point, on {SAVED_TASKS} tasks",
                f"{many} of {len(saved)}",
                _word(many >= SAVED_TASKS),
            ]
        )
        intents = [saved[task] for task in INTENT_TASKS if task in saved]
        if intents:
            text = ", ".join(f"{share:.0%}" for share in intents)
            rows.append([f"{INTENTS:.0%} on the intent tasks", text, _word(min(intents) >= INTENTS)])
        return f"## Targets\n\n{markdown([f'{self.candidate.title} against {PLAIN.title}', 'found', ''], rows)}"

    def made(self, config: str, name: str, missing: int, docs: Path, picture: Path | None) -> str:
        """The commands, and with what they ran."""
        environment = self.records[0].result["environment"]
        versions = ", ".join(f"{name} {value}" for name, value in environment.items())
        seconds = sum(r.result["seconds"]["total"] for r in self.records)
        seeds = sorted({r.seed for r in self.records})
        left = f" {missing} runs of the grid are not stored." if missing else ""
        options = f"--docs docs/results/{docs.name}" + (f" --picture docs/img/{picture.name}" if picture else "")
        return f"""## How it was made

{len(self.records)} runs in {seconds / 60:.0f} minutes of one thread, seeds {seeds[0]} to {seeds[-1]}, on the rows
that the grid names.{left} [Task by task, with intervals](paper/{name}-gains.md); the grid's own tables, the
learning rates and the rows are on a [page of their own](paper/{name}.md); `policy="auto"` against the single
rules [here](paper/policies.md); trained backbones and the paper's other tables [here](paper/small.md), a LoRA
[here](paper/lora.md), an encoder of 12 blocks [here](paper-e5.md).

```bash
python benchmarks/paper.py run {config} --data-dir DATA --out runs/{name} --threads 1
python benchmarks/paper.py headline {config} --out runs/{name} {options}
```

{versions}."""


def _word(reached: bool) -> str:
    return "reached" if reached else "**missed**"
