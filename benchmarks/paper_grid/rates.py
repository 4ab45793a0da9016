"""Learning rates: every method at its own best, chosen on validation data with one seed and short trainings."""

from __future__ import annotations

from typing import Any

from badge_peft.training.parameters import ADAPTER_LR, BACKBONE_LR
from paper_grid.methods import METHODS
from paper_grid.plan import Run, make_run
from paper_grid.settings import Settings
from paper_grid.store import Store

Rates = tuple[float, float]  # of bypasses and exits, of the backbone


def default_rates(settings: Settings, mode: str) -> Rates:
    """The grid's own rates for a backbone mode, else the library's."""
    own = settings.rates.get(mode, {})
    return own.get("adapter_lr", ADAPTER_LR), own.get("backbone_lr", BACKBONE_LR[mode])


def trial_base(settings: Settings, run: dict[str, Any]) -> dict[str, Any] | None:
    """The settings, rates left open, that the trials for `run` have; None where the grid asks for no search.

    A bottleneck's size, carried logits, exit 0 and the depth of a single exit share the rates of the plain method. A
    placement has its own, for a placement is what Table 2 compares, and so has a type of exit.
    """
    search = settings.search
    if search is None or run["mode"] not in search.adapter_lr:
        return None
    task = search.share.get(run["task"], run["task"])
    method = METHODS[run["method"]].rates_of or run["method"]
    method = search.methods.get(method, method)
    variant = {k: v for k, v in run["variant"].items() if k in ("placement", "exit_type")}
    depth = run["blocks"] if run["depth"] else None
    base = make_run(settings, task, run["backbone"], run["mode"], method, variant, search.seed, depth)
    rows = dict(base["rows"])
    if search.max_train is not None:
        rows["train"] = min(search.max_train, rows["train"] or search.max_train)
    return {**base, "rows": rows, "epochs": search.epochs, "purpose": "search"}


def trials(settings: Settings, base: dict[str, Any], store: Store) -> tuple[list[dict[str, Any]], list[Rates]]:
    """The trials that can be run now, and all rates that are in the race: adapter rates first, with the first of the
    backbone rates; then the other backbone rates, with the best adapter rate."""
    search, mode = settings.search, base["mode"]
    assert search is not None
    tried = [] if mode == "frozen" else search.backbone_lr.get(mode, [])
    backbone = tried or [default_rates(settings, mode)[1]]
    race = [(rate, backbone[0]) for rate in search.adapter_lr[mode]]
    if len(scores := race_table(base, race, store)) == len(race):
        best = max(scores, key=lambda rates: scores[rates])
        race += [(best[0], rate) for rate in backbone[1:]]
    done = race_table(base, race, store)
    return [with_rates(base, rates) for rates in race if rates not in done], race


def choose(settings: Settings, run: Run, store: Store) -> tuple[dict[str, Any], str]:
    """The run's settings with its learning rates, and where these are from: `search` or, also while trials are
    missing, `default`."""
    base = trial_base(settings, run.settings)
    if base is not None:
        missing, race = trials(settings, base, store)
        if not missing:
            scores = race_table(base, race, store)
            return with_rates(run.settings, max(scores, key=lambda rates: scores[rates])), "search"
    return with_rates(run.settings, default_rates(settings, run.settings["mode"])), "default"


def with_rates(run: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """The settings with learning rates."""
    return {**run, "adapter_lr": rates[0], "backbone_lr": rates[1]}


def race_table(base: dict[str, Any], race: list[Rates], store: Store) -> dict[Rates, float]:
    """Rates -> S-avg on validation data, of the trials that are done."""
    found = {rates: store.read(with_rates(base, rates)) for rates in race}
    return {rates: float(one["scores"]["validation"]["avg"]) for rates, one in found.items() if one is not None}
