"""The short page: forms of exits on a frozen backbone, against today's bypass, on all tasks of a grid."""

from __future__ import annotations

from pathlib import Path

from paper_grid.forms import EQUILIBRIUM, JOINT, OTHERS, PLAIN, found_forms, mean, scores_of
from paper_grid.gains_page import gains_page
from paper_grid.numbers import Numbers
from paper_grid.records import gather
from paper_grid.savings import DROP, SHARE
from paper_grid.settings import Settings
from paper_grid.store import Store
from paper_grid.tables import markdown, title_of

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
    page = Page(settings, numbers)
    name = Path(config).stem.removeprefix("paper_")
    by_task = docs.parent / "paper" / f"{name}-gains.md"
    written = [docs, by_task]
    sections = [
        f"# {settings.title}",
        page.summary(),
        page.saved(),
        page.answered(),
        page.targets(),
        page.made(config, name, len(missing), docs, picture),
    ]
    if picture is not None:
        from paper_grid.picture import draw_forms

        draw_forms(settings, records, store, numbers.places[0], (PLAIN, numbers.early[-1]), picture)
        written.append(picture)
    by_task.parent.mkdir(parents=True, exist_ok=True)
    by_task.write_text(
        gains_page(settings, page.scores(), numbers.gained, numbers.compared, numbers.places), encoding="utf-8"
    )
    docs.write_text("\n\n".join(section.strip() for section in sections) + "\n", encoding="utf-8")
    return written


class Page:
    """The sections of the page.

    Args:
        settings: The grid.
        numbers: What they say.
    """

    def __init__(self, settings: Settings, numbers: Numbers) -> None:
        self.settings, self.numbers = settings, numbers

    def summary(self) -> str:
        """What came out, in a few sentences."""
        backbones = ", ".join(dict.fromkeys(title_of(self.settings, p[1]) for p in self.numbers.places))
        rows = []
        for form, over in self.numbers.compared:
            cells = []
            for what in ("avg", "best", "early"):
                found = self.numbers.gains_of(form, over, what)
                if not found:
                    cells.append("-")
                    continue
                above, below = sum(g.low > 0 for g in found), sum(g.high < 0 for g in found)
                cells.append(f"{sum(g.mean for g in found) / len(found):+.1f}; above 0 on {above}, below on {below}")
            found = self.numbers.gains_of(form, over, "avg")
            seeds = "-".join(map(str, sorted({gain.seeds for gain in found})))
            rows.append([f"{form.title} over {over.title}", *cells, str(len(found)), seeds])
        return f"""Exits on a frozen {backbones}: what forms of them gain, the mean over tasks in points, and on
how many tasks the paired 95% interval lies above or below zero. BADGE is the plain bypass, JT has none; what
`carry` does:
[exits that build on one another](../choosing.md#exits-that-build-on-one-another-carry). Attention is
[`exit_type="residual_mha"`](../choosing.md#exit-type-exit_type),
[exit 0](../choosing.md#exits-exit_layers-final_exit) an exit on the embeddings; S-avg and S-best are of the exits
behind a block. {SHARE:.0%} saved: the score of early answers, by the rule that
`calibrate(policy="auto", target_blocks_saved={SHARE})` takes on validation rows.

{markdown(["", "S-avg", "S-best", f"{SHARE:.0%} saved", "tasks", "seeds"], rows)}
{self._same_as_joint()}"""

    def scores(self) -> str:
        """S-avg / S-best of all forms."""
        forms = [*self.numbers.forms, *found_forms(self.numbers.records, OTHERS)]
        rows = []
        for form in forms:
            cells = []
            for place in self.numbers.places:
                avg, best = (scores_of(self.numbers.records, form, place, what) for what in ("avg", "best"))
                cells.append(f"{mean(avg):.1f} / {mean(best):.1f}" if avg else "-")
            counts = {len(scores_of(self.numbers.records, form, place, "avg")) for place in self.numbers.places} - {0}
            rows.append([f"{form.title} ({'-'.join(map(str, sorted(counts)))})", *cells])
        header = ["S-avg / S-best (seeds)", *map(self.numbers.title, self.numbers.places)]
        return "## Scores on test data, mean over seeds\n\n" + markdown(header, rows)

    def _same_as_joint(self) -> str:
        """GradEquil rescales what reaches the blocks, and frozen ones receive nothing."""
        ours, others = (
            [scores_of(self.numbers.records, form, p, "avg") for p in self.numbers.places]
            for form in (JOINT, EQUILIBRIUM)
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
        forms = [form for form in self.numbers.early if form != JOINT]
        rows = []
        for place in self.numbers.places:
            held = next(r.result["data"]["rows"]["validation"] for r in self.numbers.records if r.place == place)
            found = [self.numbers.saved_within[form, place] for form in forms]
            cells = [f"{_mean(one, 0):.0%} ({_mean(one, 1):+.1f})" if one else "-" for one in found]
            rows.append([self.numbers.title(place), str(held), *cells])
        note = f"""The share of the blocks saved on test rows, by what `calibrate("auto", max_score_drop={DROP})`
takes on validation rows, and in brackets the points lost against the exit that is best on validation rows; means over
seeds. A few hundred validation rows cannot show that half a point is kept
([what is taken then](../calibration.md#what-a-drop-is))."""
        header = ["saved (points lost)", "validation rows", *(form.title for form in forms)]
        return f"## Blocks saved for half a point\n\n{note}\n\n{markdown(header, rows)}"

    def answered(self) -> str:
        """Scores of early answers where many blocks are saved."""
        numbers = self.numbers
        rows = []
        for place in numbers.places:
            found = [numbers.answered[form, place] for form in numbers.early]
            cells = [f"{_mean(one, 1):.1f} ({_mean(one, 0):.0%})" if one else "-" for one in found]
            rows.append([numbers.title(place), *cells])
        note = f"""The score of test rows, by what `calibrate("auto", target_blocks_saved={SHARE})` takes on validation
rows, and in brackets the share of the blocks saved; means over seeds."""
        header = ["score (saved)", *(form.title for form in numbers.early)]
        return f"## Answers at {SHARE:.0%} of the blocks saved\n\n{note}\n\n{markdown(header, rows)}"

    def targets(self) -> str:
        """Reached or missed, by form."""
        forms = [form for form in self.numbers.early if form not in (JOINT, PLAIN)]
        rows = []
        for what, name in (("avg", "S-avg"), ("best", "S-best")):
            cells = []
            for form in forms:
                found = self.numbers.gains_of(form, PLAIN, what)
                count = sum(g.low > 0 and g.mean >= GAIN for g in found)
                cells.append(f"{count} of {len(found)}, {_word(count >= ENOUGH)}")
            rows.append([f"{name} {GAIN:+.1f} over {PLAIN.title}, interval above 0, on {ENOUGH} tasks", *cells])
        saved = [{p[0]: _mean(self.numbers.saved_within[form, p], 0) for p in self.numbers.places} for form in forms]
        many = [sum(share >= SAVED for share in found.values()) for found in saved]
        rows.append(
            [
                f"{SAVED:.0%} of the blocks saved for half a point, on {SAVED_TASKS} tasks",
                *(f"{count} of {len(self.numbers.places)}, {_word(count >= SAVED_TASKS)}" for count in many),
            ]
        )
        intents = [[found[task] for task in INTENT_TASKS if task in found] for found in saved]
        if all(intents):
            cells = [f"{', '.join(f'{share:.0%}' for share in one)}, {_word(min(one) >= INTENTS)}" for one in intents]
            rows.append([f"{INTENTS:.0%} on the intent tasks", *cells])
        return f"## Targets\n\n{markdown(['', *(form.title for form in forms)], rows)}"

    def made(self, config: str, name: str, missing: int, docs: Path, picture: Path | None) -> str:
        """The commands, and with what they ran."""
        environment = self.numbers.records[0].result["environment"]
        versions = ", ".join(f"{name} {value}" for name, value in environment.items())
        records = self.numbers.records
        seconds = sum(r.result["seconds"]["total"] for r in records)
        seeds = sorted({r.seed for r in self.numbers.records})
        left = f" {missing} runs of the grid are not stored." if missing else ""
        models = " --model-dir MODELS" if any(b.folder for b in self.settings.backbones.values()) else ""
        options = f"--docs docs/results/{docs.name}" + (f" --picture docs/img/{picture.name}" if picture else "")
        return f"""## How it was made

{len(records)} runs in {seconds / 60:.0f} minutes of one thread, seeds {seeds[0]} to {seeds[-1]}, on the rows
that the grid names.{left} [Task by task, scores and intervals](paper/{name}-gains.md); the grid's own tables, the
learning rates and the rows are on a [page of their own](paper/{name}.md); `policy="auto"` against the single
rules [here](paper/policies.md); a backbone that is trained [here](paper/trained.md), at one learning rate for every
method [here](paper/trained-one-rate.md); a LoRA [here](paper/lora.md), the
paper's other tables [here](paper/small.md), an encoder of 12 blocks [here](paper-e5.md).

```bash
python benchmarks/paper.py run {config} --data-dir DATA{models} --out runs/{name} --threads 1
python benchmarks/paper.py headline {config} --out runs/{name} {options}
```

{versions}."""


def _mean(pairs: list[tuple[float, float]], which: int) -> float:
    """Over seeds; 0 for none."""
    return sum(pair[which] for pair in pairs) / len(pairs) if pairs else 0.0


def _word(reached: bool) -> str:
    return "reached" if reached else "**missed**"
