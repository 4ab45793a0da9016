"""The short page: forms of exits on a frozen backbone, against today's bypass, on all tasks of a grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from badge_peft.utils.files import write_json
from paper_grid.forms import (
    DEFAULT,
    DROP,
    FORMS,
    OTHERS,
    PLAIN,
    Form,
    Saved,
    found_forms,
    gains_over,
    mean,
    saved_by,
    scores_of,
)
from paper_grid.records import Place, Record, gather, places
from paper_grid.resampled import LEVEL, RESAMPLES, Gain
from paper_grid.settings import Settings
from paper_grid.store import Store
from paper_grid.tables import markdown, task_title, title_of

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
    written = [docs]
    sections = [
        f"# {settings.title}",
        numbers.summary(),
        numbers.scores(),
        numbers.gains(),
        numbers.saved(),
        numbers.targets(),
        numbers.made(config, len(missing)),
    ]
    if picture is not None:
        from paper_grid.picture import draw_forms

        draw_forms(settings, records, store, numbers.places[0], (PLAIN, DEFAULT), picture)
        written.append(picture)
    docs.parent.mkdir(parents=True, exist_ok=True)
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
        self.places = [p for p in places(records) if any(PLAIN.fits(r, p) for r in records)]
        self.forms = found_forms(records)
        self.rivals = [form for form in self.forms if form != PLAIN]
        self.over_plain: dict[tuple[Form, Place], dict[str, Gain]] = {}
        for form in self.rivals:
            for place in self.places:
                found = gains_over(records, form, place, store, settings)
                if found is not None:
                    self.over_plain[form, place] = found
        self._saved = self._saved_blocks()

    def _saved_blocks(self) -> dict[str, dict[str, Saved]]:
        """By form and task; calibrations take a while, so they are kept beside the runs."""
        path = self.store.root / "saved.json"
        kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        found: dict[str, dict[str, Saved]] = {}
        for form in (PLAIN, DEFAULT):
            for place in self.places:
                mine = [r for r in self.records if form.fits(r, place)]
                key = f"{form.title} {place} {sorted(r.result['key'] for r in mine)}"
                if mine and key not in kept:
                    saved = saved_by(mine, form, place, self.store, self.settings)
                    kept[key] = {"saved": saved.saved, "drop": saved.drop}
                    write_json(path, kept)
                if mine:
                    one = {name: {int(s): v for s, v in values.items()} for name, values in kept[key].items()}
                    found.setdefault(form.title, {})[place[0]] = Saved(**one)
        return found

    def title(self, place: Place) -> str:
        """Of a task."""
        return task_title(self.settings, place[0])

    def ahead(self, form: Form, what: str, points: float = 0.0) -> tuple[int, int]:
        """On how many tasks the interval lies above 0 and the mean at `points` or more; and of how many."""
        found = [self.over_plain[form, p][what] for p in self.places if (form, p) in self.over_plain]
        return sum(g.low > 0 and g.mean >= points for g in found), len(found)

    def average(self, form: Form, what: str) -> float:
        """The gain of a form, the mean over tasks."""
        found = [self.over_plain[form, p][what].mean for p in self.places if (form, p) in self.over_plain]
        return sum(found) / len(found)

    def summary(self) -> str:
        """What came out, in a few sentences."""
        backbones = ", ".join(dict.fromkeys(title_of(self.settings, p[1]) for p in self.places))
        lines = []
        for form in self.rivals:
            if form.method == "badge":
                (avg, tasks), (best, _) = self.ahead(form, "avg"), self.ahead(form, "best")
                lines.append(
                    f"* **{form.title}**: S-avg {self.average(form, 'avg'):+.1f} points, above zero on {avg} of "
                    f"{tasks} tasks; S-best {self.average(form, 'best'):+.1f}, on {best} of {tasks}."
                )
        head = f"""Exits on a frozen {backbones}, {len(self.places)} tasks, against today's bypass (BADGE, plain):
the mean over tasks, and on how many the paired interval lies above zero. `carry` is `carry="logits"`, `ladder` is
`ladder=True` ([what they do](../choosing.md#exits-that-build-on-one-another-carry-ladder)); JT has no bypass."""
        return head + "\n\n" + "\n".join(lines)

    def scores(self) -> str:
        """S-avg / S-best of all forms."""
        forms = [*self.forms, *found_forms(self.records, OTHERS)]
        rows = []
        for form in forms:
            cells = []
            for place in self.places:
                avg, best = (scores_of(self.records, form, place, what) for what in ("avg", "best"))
                cells.append(f"{mean(avg):.1f} / {mean(best):.1f}" if avg else "-")
            seeds = max(len(scores_of(self.records, form, place, "avg")) for place in self.places)
            rows.append([f"{form.title} ({seeds})", *cells])
        header = ["S-avg / S-best (seeds)", *map(self.title, self.places)]
        same = self._same_as_joint()
        return "## Scores on test data, mean over seeds\n\n" + markdown(header, rows) + (f"\n{same}" if same else "")

    def _same_as_joint(self) -> str:
        """GradEquil rescales what reaches the blocks, and frozen ones receive nothing."""
        joint, other = FORMS[0], OTHERS[2]
        pairs = [
            [r.result["scores"]["test"]["per_exit"] for r in self.records if form.fits(r, p) and r.seed == seed]
            for p in self.places
            for seed in scores_of(self.records, other, p, "avg")
            for form in (joint, other)
        ]
        if pairs and all(a == b for a, b in zip(pairs[::2], pairs[1::2], strict=True)):
            runs = len(pairs) // 2
            return (
                f"GradEquil gave exactly the scores of JT in all of its {runs} runs: a frozen block takes no gradient."
            )
        return ""

    def gains(self) -> str:
        """Paired differences from the plain bypass."""
        rows = []
        for place in self.places:
            for what, name in (("avg", "S-avg"), ("best", "S-best")):
                cells = [
                    self.over_plain[form, place][what].text if (form, place) in self.over_plain else "-"
                    for form in self.rivals
                ]
                rows.append([self.title(place) if what == "avg" else "", name, *cells])
        note = (
            f"Points, [{LEVEL:.0%} interval] of a paired bootstrap over seeds and test rows ({RESAMPLES} resamples)."
        )
        header = ["task", "", *(form.title for form in self.rivals)]
        return f"## Ahead of the plain bypass\n\n{note}\n\n{markdown(header, rows)}"

    def saved(self) -> str:
        """Blocks saved within half a point."""
        rows = []
        for place in self.places:
            cells = []
            for form in (PLAIN, DEFAULT):
                one = self._saved.get(form.title, {}).get(place[0])
                cells += [f"{mean(one.saved):.0%}", f"{mean(one.drop):+.1f}"] if one else ["-", "-"]
            held = next(r.result["data"]["rows"]["validation"] for r in self.records if r.place == place)
            rows.append([self.title(place), str(held), *cells])
        header = ["task", "validation rows"]
        header += [text for form in (PLAIN, DEFAULT) for text in (f"{form.title}: saved", "drop")]
        note = f"""`calibrate(policy="auto", max_score_drop={DROP})` on validation rows, its setting on test rows: the
share of the blocks saved, and the points lost against the exit that is best on validation rows. A few hundred
validation rows cannot show that half a point is kept, so that little or nothing is saved there."""
        return f"## Blocks saved for half a point\n\n{note}\n\n{markdown(header, rows)}"

    def targets(self) -> str:
        """Reached or missed."""
        rows = []
        for what, name in (("avg", "S-avg"), ("best", "S-best")):
            count, tasks = self.ahead(DEFAULT, what, GAIN)
            rows.append(
                [
                    f"{name} {GAIN:+.1f}, interval above 0, on {ENOUGH} tasks",
                    f"{count} of {tasks}",
                    _word(count >= ENOUGH),
                ]
            )
        saved = {task: mean(one.saved) for task, one in self._saved.get(DEFAULT.title, {}).items()}
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
        return f"## Targets\n\n{markdown([f'{DEFAULT.title} against {PLAIN.title}', 'found', ''], rows)}"

    def made(self, config: str, missing: int) -> str:
        """The commands, and with what they ran."""
        environment = self.records[0].result["environment"]
        versions = ", ".join(f"{name} {value}" for name, value in environment.items())
        seconds = sum(r.result["seconds"]["total"] for r in self.records)
        seeds = sorted({r.seed for r in self.records})
        left = f" {missing} runs of the grid are not stored." if missing else ""
        return f"""## How it was made

{len(self.records)} runs in {seconds / 60:.0f} minutes of one thread, seeds {seeds[0]} to {seeds[-1]}, on the rows
that the grid names (a part of some data sets).{left} The grid's own tables, the learning rates and the rows are on a
[page of their own](paper/frozen.md); `policy="auto"` against the single rules [here](paper/policies.md); trained
backbones and the paper's other tables [here](paper/small.md).

```bash
python benchmarks/paper.py run {config} --data-dir DATA --out runs/frozen --threads 1
python benchmarks/paper.py headline {config} --out runs/frozen --picture docs/img/frozen.png
```

{versions}."""


def _word(reached: bool) -> str:
    return "reached" if reached else "**missed**"
