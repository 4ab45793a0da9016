"""Scores and gains of forms, task by task: the figures behind the means of the short page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paper_grid.forms import Form
from paper_grid.records import Place
from paper_grid.resampled import LEVEL, RESAMPLES, Gain
from paper_grid.settings import Settings
from paper_grid.tables import markdown, task_title

Pair = tuple[Form, Form]  # a form, and what it is compared with


def gains_page(
    settings: Settings,
    scores: str,
    gained: Mapping[tuple[Form, Form, Place], dict[str, Gain]],
    compared: Sequence[Pair],
    places: Sequence[Place],
) -> str:
    """The scores, and two tables of gains, in S-avg and S-best: a row for each pair, a column for each task.

    Args:
        settings: The grid.
        scores: A section.
        gained: By pair and place.
        compared: The pairs, in order.
        places: The columns.
    """
    note = f"""Gains are in points, [{LEVEL:.0%} interval] of a paired bootstrap over seeds and test rows ({RESAMPLES}
resamples), of the seeds that both have."""
    text = f"# {settings.title}, task by task\n\n{scores.strip()}\n\n{note}\n"
    header = [task_title(settings, place[0]) for place in places]
    for what, name in (("avg", "S-avg"), ("best", "S-best")):
        rows = []
        for form, over in compared:
            found = [gained.get((form, over, place)) for place in places]
            seeds = sorted({one[what].seeds for one in found if one})
            title = f"{form.title} over {over.title} ({'-'.join(map(str, seeds))})"
            rows.append([title, *(one[what].text if one else "-" for one in found)])
        text += f"\n## Gains in {name}\n\n{markdown([f'{name} (seeds)', *header], rows)}"
    return text
