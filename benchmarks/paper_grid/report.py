"""The page: tables and figures from whatever is stored, with what is missing and how it was made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from common import markdown

from paper_grid import tables
from paper_grid.curves import draw, policy_curves, policy_lines
from paper_grid.methods import TITLES
from paper_grid.plan import Run
from paper_grid.rates import race_table, trial_base, trials
from paper_grid.records import Record, gather, places
from paper_grid.settings import Settings
from paper_grid.store import Store

_FIGURE_NOTE = """Thresholds are swept on the test logits, with straight lines between the points (mixing two settings
reaches what lies between); DGE's t in 1..3 is at each saving the one that is best on validation data. Speed is the
share of blocks saved, not wall-clock time. `agreement` is fitted on validation data and goes no deeper than the exit
that is best there; it is not in the paper. LTE needs exits that were trained with it, so it has a model of its own."""


def write_report(
    settings: Settings, store: Store, docs: str | Path, config: str | Path, figures: bool = True
) -> list[Path]:
    """Writes the page, with Figure 2 (whose sweeps take a while) its pictures, in a folder of its name; returns the
    files."""
    records, missing = gather(settings, store)
    if not records:
        raise ValueError(f"{store.root} holds no finished run of {config}: start with the command `run`.")
    docs = Path(docs)
    docs.parent.mkdir(parents=True, exist_ok=True)
    figure_2, pictures = _figure_2(settings, records, store, docs.with_suffix("")) if figures else ("", [])
    sections = [
        f"# {settings.title}",
        *([settings.note.strip()] if settings.note else []),
        _made_by(settings, records, missing, config, docs.name),
        "## Table 1: training methods",
        "Scores on test data in per cent: the median over seeds (and the range). S-avg is the mean over exits 1..M, "
        "S-best the best of them.",
        tables.table_1(settings, records),
        "The paper's own (ALBERT-base, 12 exits, halved dev sets as test data):",
        tables.paper_table_1(),
        *_section("## Table 2: where the bypass reads", tables.table_2(settings, records)),
        *_section("## Table 3: bottleneck dimension", tables.table_3(settings, records)),
        *_section("## Table 6: backbones", tables.table_6(settings, records)),
        *_section("## Figure 2: exit policies", figure_2),
        *_section("## Exit 0, beyond the paper", tables.exit_0_table(settings, records)),
        "## Learning rates",
        _rates(settings, records, store),
        "## Data",
        _data(settings, records),
        "## Missing",
        _missing(missing),
    ]
    docs.write_text("\n\n".join(section.strip() for section in sections if section.strip()) + "\n")
    return [docs, *pictures]


def _section(title: str, table: str) -> list[str]:
    """Nothing where the grid has no such runs."""
    return [title, table] if table else []


def _figure_2(settings: Settings, records: list[Record], store: Store, folder: Path) -> tuple[str, list[Path]]:
    text, pictures = f"{_FIGURE_NOTE}\n\n", []
    for place in places(records):
        for variant, word in (({}, ""), ({"exit_0": True}, " with exit 0")):
            curves = policy_curves(records, store, place, variant)
            if "DGE" not in curves:
                continue
            title = tables.place_title(settings, place) + word
            picture = folder / f"{'-'.join(place)}{'-exit0' if variant else ''}.png"
            draw(policy_lines(curves), title, settings.tasks[place[0]].metric, picture)
            pictures.append(picture)
            text += f"### {title}\n\n![{title}]({folder.name}/{picture.name})\n\n"
            text += tables.saving_table(curves, settings.savings) + "\n\n"
    return text, pictures


def _made_by(
    settings: Settings, records: list[Record], missing: list[tuple[Run, str]], config: str | Path, page: str
) -> str:
    name = f"benchmarks/{Path(config).name}"
    machines = Counter(r.result["environment"] for r in records).most_common()
    seconds = sum(r.result["seconds"]["total"] for r in records)
    sources = Counter(r.rates for r in records)
    half = "bfloat16 autocast in training, with a frozen backbone in its passes alone, else float32"
    return "\n".join(
        [
            "Made from stored runs by",
            "",
            "```bash",
            f"python benchmarks/paper.py run {name} --data-dir DATA --model-dir MODELS --out runs/paper",
            f"python benchmarks/paper.py report {name} --out runs/paper --docs docs/results/paper/{page}",
            "```",
            "",
            f"* {len(records)} of {len(records) + len(missing)} runs are finished; one after the other they took "
            f"{seconds / 60:.0f} minutes, the search for learning rates not counted.",
            f"* Seeds {sorted({r.seed for r in records})}. {_epochs(settings)}; AdamW without weight decay, 10% "
            f"warm-up, linear decay, batches of similar length; {half if settings.bf16 else 'float32'}. 2ST trains "
            "as many epochs in each of its stages. A single exit at depth m is a backbone cut off behind block m.",
            f"* Learning rates by source: {', '.join(f'{k} {v} runs' for k, v in sources.items())}.",
            *(f"* {machine} ({count} runs)" for machine, count in machines),
        ]
    )


def _epochs(settings: Settings) -> str:
    if settings.patience is None:
        return f"{settings.epochs} epochs (tasks may differ), of which the last state counts"
    return (
        f"At most {settings.epochs} epochs (tasks may differ), the best by S-avg on validation data, early stopping "
        f"after {settings.patience} without a better one"
    )


def _rates(settings: Settings, records: list[Record], store: Store) -> str:
    if settings.search is None:
        return (
            "No search: every method has the same rates, so differences between methods may be differences of rates."
        )
    s = settings.search
    text = (
        f"S-avg on validation data of the trials (seed {s.seed}, {s.epochs} epochs, at most {s.max_train or 'all'} "
        "training rows): rate of bypasses and exits / rate of the backbone. The best is used; * marks a best at the "
        "edge of what was tried, where a wider search may find better. A bottleneck's size, exit 0, the depth of a "
        "single exit and LTE take the rates of the plain method."
    )
    if s.share:
        text += " " + "; ".join(f"{a} takes the rates of {b}" for a, b in s.share.items()) + "."
    rows: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        base = trial_base(settings, record.run.settings)
        if base is None or record.rates != "search":
            continue
        name = TITLES[base["method"]] + "".join(f", {value}" for value in base["variant"].values())
        key = (tables.place_title(settings, (base["task"], base["backbone"], base["mode"])), name)
        if key in rows:
            continue
        race = race_table(base, trials(settings, base, store)[1], store)
        best = max(race, key=lambda rates: race[rates])
        tried = [sorted({rates[i] for rates in race}) for i in range(2)]  # a single rate has no edge
        edge = any(len(some) > 1 and rate in (some[0], some[-1]) for rate, some in zip(best, tried, strict=True))
        tried_all = ", ".join(f"{a:g} / {b:g}: {100 * v:.1f}" for (a, b), v in race.items())
        rows[key] = [*key, f"{best[0]:g} / {best[1]:g}{' *' if edge else ''}", tried_all]
    return text + "\n\n" + markdown(["task", "method", "best", "trials"], list(rows.values()))


def _data(settings: Settings, records: list[Record]) -> str:
    rows = {}
    for record in records:
        task = settings.tasks[record.settled["task"]]
        data = record.result["data"]
        subset = "a seeded subset" if task.max_train or task.max_test or task.max_validation else "all rows"
        counts = [str(data["rows"][split]) for split in ("train", "validation", "test")]
        rows[record.settled["task"]] = [
            tables.task_title(settings, record.settled["task"]),
            task.data,
            task.metric,
            *counts,
            str(task.max_length),
            str(record.settled["batch_size"]),
            f"{subset} (seed {settings.data_seed})" if subset != "all rows" else subset,
        ]
    header = ["task", "source", "metric", "train", "validation", "test", "tokens", "batch", "rows"]
    return markdown(header, list(rows.values()))


def _missing(missing: list[tuple[Run, str]]) -> str:
    if not missing:
        return "Nothing: every run of the grid is stored."
    labels = dict.fromkeys(run.label.rsplit("/s", 1)[0] for run, _ in missing)
    return f"{len(missing)} runs are not stored; the same `run` command makes them: `{'`, `'.join(labels)}`."
