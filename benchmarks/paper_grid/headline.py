"""The short page: forms of exits on a frozen backbone, against today's bypass, on all tasks of a grid."""

from __future__ import annotations

from pathlib import Path

from common import markdown

from badge_peft.evaluation import exit_scores
from paper_grid.curves import draw, form_lines
from paper_grid.forms import COMPARED, EARLY, FORMS, JOINT, PLAIN, is_of, logits_of, mean, records_of, scores_of
from paper_grid.records import Place, Record, gather, places
from paper_grid.resampled import LEVEL, RESAMPLES, Gain, gains
from paper_grid.savings import DROP, SHARE, Savings
from paper_grid.settings import Settings
from paper_grid.store import Store
from paper_grid.tables import place_title, task_title, title_of

GAIN, ENOUGH = 1.0, 5  # points, on so many tasks
SAVED, SAVED_TASKS, INTENTS = 0.70, 4, 0.85
INTENT_TASKS = ("banking77", "clinc150")


def write_headline(settings: Settings, store: Store, docs: Path, picture: Path | None, config: str) -> list[Path]:
    """Writes the page, that of the tasks, and the picture of the first task."""
    records, missing = gather(settings, store)
    if not any(is_of(r, PLAIN, r.place) for r in records):
        raise ValueError(f"{store.root} holds no run of {PLAIN}: start with the command `run`.")
    page = Page(settings, store, records)
    name = Path(config).stem.removeprefix("paper_")
    by_task = docs.parent / "paper" / f"{name}-gains.md"
    by_task.parent.mkdir(parents=True, exist_ok=True)
    by_task.write_text(page.by_task(), encoding="utf-8")
    made = page.made(config, name, len(missing), docs, picture)
    sections = [f"# {settings.title}", page.summary(), page.saved(), page.answered(), page.targets(), made]
    docs.write_text("\n\n".join(section.strip() for section in sections) + "\n", encoding="utf-8")
    if picture is None:
        return [docs, by_task]
    place = page.places[0]
    metric = settings.tasks[page.places[0][0]].metric
    lines = form_lines(records, store, place, PLAIN, page.early[-1], metric)
    draw(lines, place_title(settings, place), metric, picture)
    return [docs, by_task, picture]


class Page:
    """Gains of forms over others, what their early answers save, and the sections that say so."""

    def __init__(self, settings: Settings, store: Store, records: list[Record]) -> None:
        self.settings = settings
        self.store = store
        self.records = records
        self.places = [p for p in places(records) if p[2] == "frozen" and any(is_of(r, PLAIN, p) for r in records)]
        self.forms = [form for form in FORMS if any(is_of(r, form, r.place) for r in records)]
        self.early = [form for form in EARLY if form in self.forms]
        #: By pair and place the gain in S-avg (`avg`), in S-best (`best`), and of early answers (`early`).
        self.gained: dict[tuple[str, str, Place], dict[str, Gain]] = {}
        for form, over in COMPARED:
            for place in self.places:
                both = (logits_of(records, one, place, store) for one in (form, over))
                if (found := gains(*both, self._metric(place))) is not None:
                    self.gained[form, over, place] = found
        self.compared = [pair for pair in COMPARED if any((*pair, p) in self.gained for p in self.places)]
        #: By form and place, of each seed the share of blocks saved within `DROP` and the points lost, and the share
        #: saved where it should be `SHARE` and the score of the answers.
        self.within: dict[tuple[str, Place], list[tuple[float, float]]] = {}
        self.shared: dict[tuple[str, Place], list[tuple[float, float]]] = {}
        for place in self.places:
            self._add_early(place, Savings(store))

    def _add_early(self, place: Place, savings: Savings) -> None:
        answers, metric = {}, self._metric(place)
        for form in self.early:
            mine = records_of(self.records, form, place)
            if form != JOINT:
                self.within[form, place] = [savings.within_drop(record) for record in mine]
            found = {record.seed: savings.answers(record, "share") for record in mine}
            answers[form] = {seed: one for seed, (one, _) in found.items()}
            self.shared[form, place] = [(share, 100 * exit_scores(one, metric).best) for one, share in found.values()]
        for form, over in self.compared:
            if form in answers and over in answers:
                if (gained := gains(answers[form], answers[over], metric)) is not None:
                    self.gained[form, over, place]["early"] = gained["avg"]

    def _metric(self, place: Place) -> str:
        return self.settings.tasks[place[0]].metric

    def _title(self, place: Place) -> str:
        return task_title(self.settings, place[0])

    def gains_of(self, form: str, over: str, what: str) -> list[Gain]:
        """One for each task."""
        found = [self.gained.get((form, over, p), {}).get(what) for p in self.places]
        return [gain for gain in found if gain is not None]

    def summary(self) -> str:
        """What came out, in a few sentences."""
        backbones = ", ".join(dict.fromkeys(title_of(self.settings, p[1]) for p in self.places))
        rows = []
        for form, over in self.compared:
            cells = []
            for found in (self.gains_of(form, over, what) for what in ("avg", "best", "early")):
                above = sum(g.low > 0 for g in found)
                below = sum(g.high < 0 for g in found)
                said = f"{mean([g.mean for g in found]):+.1f}; above 0 on {above}, below on {below}"
                cells.append(said if found else "-")
            found = self.gains_of(form, over, "avg")
            rows.append([f"{form} over {over}", *cells, str(len(found)), _counts(gain.seeds for gain in found)])
        return f"""Exits on a frozen {backbones}: what forms of them gain, the mean over tasks in points, and on
how many tasks the paired 95% interval lies above or below zero. BADGE is the plain bypass, JT has none; what `carry`
does: [exits that build on one another](../choosing.md). Attention is
[`exit_type="residual_mha"`](../choosing.md#exit-type-exit_type),
[exit 0](../choosing.md#exits-exit_layers-final_exit) an exit on the embeddings; S-avg and S-best are of the exits
behind a block. {SHARE:.0%} saved: the score of early answers, by the policy that
`calibrate(policy="auto", target_blocks_saved={SHARE})` takes on validation rows.

{markdown(["", "S-avg", "S-best", f"{SHARE:.0%} saved", "tasks", "seeds"], rows)}

{self._same_as_joint()}"""

    def _same_as_joint(self) -> str:
        """GradEquil rescales what reaches the blocks, and frozen ones receive nothing."""
        far = []
        for place in self.places:
            ours, others = (scores_of(self.records, form, place, "avg") for form in (JOINT, "GradEquil"))
            far += [abs(ours[seed] - others[seed]) for seed in ours.keys() & others.keys()]
        if not far:
            return ""
        return (
            f"GradEquil is JT here, since a frozen block takes no gradient that could be rescaled: in {len(far)} runs "
            f"of each, S-avg differs by at most {max(far):.2f} points, the rounding of stored states."
        )

    def by_task(self) -> str:
        """Scores and gains of forms, task by task: a row for each pair, a column for each task."""
        header = [self._title(place) for place in self.places]
        rows = []
        for form in self.forms:
            found = [[scores_of(self.records, form, p, what) for what in ("avg", "best")] for p in self.places]
            cells = [f"{mean(a.values()):.1f} / {mean(b.values()):.1f}" if a else "-" for a, b in found]
            rows.append([f"{form} ({_counts(len(avg) for avg, _ in found if avg)})", *cells])
        text = f"""# {self.settings.title}, task by task

## Scores on test data, mean over seeds

{markdown(["S-avg / S-best (seeds)", *header], rows)}

Gains are in points, [{LEVEL:.0%} interval] of a paired bootstrap over seeds and test rows ({RESAMPLES}
resamples), of the seeds that both have.
"""
        for what, name in (("avg", "S-avg"), ("best", "S-best")):
            rows = []
            for form, over in self.compared:
                seeds = _counts(gain.seeds for gain in self.gains_of(form, over, what))
                found = [self.gained.get((form, over, place)) for place in self.places]
                rows.append([f"{form} over {over} ({seeds})", *(one[what].text if one else "-" for one in found)])
            text += f"\n## Gains in {name}\n\n{markdown([f'{name} (seeds)', *header], rows)}\n"
        return text

    def saved(self) -> str:
        """Blocks saved within half a point."""
        forms = [form for form in self.early if form != JOINT]
        rows = []
        for place in self.places:
            held = next(r.result["data"]["rows"]["validation"] for r in self.records if r.place == place)
            found = [self.within[form, place] for form in forms]
            cells = [f"{_mean(one, 0):.0%} ({_mean(one, 1):+.1f})" if one else "-" for one in found]
            rows.append([self._title(place), str(held), *cells])
        return f"""## Blocks saved for half a point

The share of the blocks saved on test rows, by what `calibrate("auto", max_score_drop={DROP})`
takes on validation rows, and in brackets the points lost against the exit that is best on validation rows; means over
seeds. A few hundred validation rows cannot show that half a point is kept
([what is taken then](../calibration.md#what-a-drop-is)).

{markdown(["saved (points lost)", "validation rows", *forms], rows)}"""

    def answered(self) -> str:
        """Scores of early answers where many blocks are saved."""
        rows = []
        for place in self.places:
            found = [self.shared[form, place] for form in self.early]
            cells = [f"{_mean(one, 1):.1f} ({_mean(one, 0):.0%})" if one else "-" for one in found]
            rows.append([self._title(place), *cells])
        return f"""## Answers at {SHARE:.0%} of the blocks saved

The score of test rows, by what `calibrate("auto", target_blocks_saved={SHARE})` takes on validation
rows, and in brackets the share of the blocks saved; means over seeds.

{markdown(["score (saved)", *self.early], rows)}"""

    def targets(self) -> str:
        """Reached or missed, by form."""
        forms = [form for form in self.early if form not in (JOINT, PLAIN)]
        rows = []
        for what, name in (("avg", "S-avg"), ("best", "S-best")):
            cells = []
            for found in (self.gains_of(form, PLAIN, what) for form in forms):
                count = sum(g.low > 0 and g.mean >= GAIN for g in found)
                cells.append(f"{count} of {len(found)}, {_word(count >= ENOUGH)}")
            rows.append([f"{name} {GAIN:+.1f} over {PLAIN}, interval above 0, on {ENOUGH} tasks", *cells])
        saved = [{p[0]: _mean(self.within[form, p], 0) for p in self.places} for form in forms]
        many = [sum(share >= SAVED for share in found.values()) for found in saved]
        cells = [f"{count} of {len(self.places)}, {_word(count >= SAVED_TASKS)}" for count in many]
        rows.append([f"{SAVED:.0%} of the blocks saved for half a point, on {SAVED_TASKS} tasks", *cells])
        intents = [[found[task] for task in INTENT_TASKS if task in found] for found in saved]
        if all(intents):
            cells = [f"{', '.join(f'{share:.0%}' for share in one)}, {_word(min(one) >= INTENTS)}" for one in intents]
            rows.append([f"{INTENTS:.0%} on the intent tasks", *cells])
        return f"## Targets\n\n{markdown(['', *forms], rows)}"

    def made(self, config: str, name: str, missing: int, docs: Path, picture: Path | None) -> str:
        """The commands, and with what they ran."""
        seconds = sum(r.result["seconds"]["total"] for r in self.records)
        seeds = sorted({r.seed for r in self.records})
        left = f" {missing} runs of the grid are not stored." if missing else ""
        models = " --model-dir MODELS" if any(b.folder for b in self.settings.backbones.values()) else ""
        options = f"--docs docs/results/{docs.name}" + (f" --picture docs/img/{picture.name}" if picture else "")
        return f"""## How it was made

{len(self.records)} runs in {seconds / 60:.0f} minutes of one thread, seeds {seeds[0]} to {seeds[-1]}, on the rows
that the grid names.{left} [Task by task, scores and intervals](paper/{name}-gains.md); the grid's own tables, the
learning rates and the rows are on a [page of their own](paper/{name}.md); `policy="auto"` against the single
policies [here](paper/policies.md); a backbone that is trained [here](paper/trained.md), at one learning rate for every
method [here](paper/trained-one-rate.md); a LoRA [here](paper/lora.md), the
paper's other tables [here](paper/small.md), an encoder of 12 blocks [here](paper-e5.md).

```bash
python benchmarks/paper.py run {config} --data-dir DATA{models} --out runs/{name} --threads 1
python benchmarks/paper.py headline {config} --out runs/{name} {options}
```

{self.records[0].result["environment"]}."""


def _counts(seeds: object) -> str:
    return "-".join(map(str, sorted(set(seeds))))  # type: ignore[call-overload]


def _mean(pairs: list[tuple[float, float]], which: int) -> float:
    """Over seeds; 0 for none."""
    return mean([pair[which] for pair in pairs]) if pairs else 0.0


def _word(reached: bool) -> str:
    return "reached" if reached else "**missed**"
