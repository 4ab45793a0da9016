"""Learning rates: every method at its own best, chosen on validation data with one seed and short trainings."""

from __future__ import annotations

from typing import Any

from badge_peft.training.parameters import ADAPTER_LR, BACKBONE_LR
from paper_grid.methods import METHODS
from paper_grid.plan import Run, make_run
from paper_grid.settings import Search, Settings
from paper_grid.store import Store

Rates = tuple[float, float]  # of bypasses and exits, of the backbone
_TUNED = ("activation", "batch_size", "adapter_lr", "backbone_lr")


def default_rates(settings: Settings, mode: str) -> Rates:
    """The grid's own rates for a backbone mode, else the library's."""
    own = settings.rates.get(mode, {})
    return own.get("adapter_lr", ADAPTER_LR), own.get("backbone_lr", BACKBONE_LR[mode])


def trial_base(settings: Settings, run: dict[str, Any]) -> dict[str, Any] | None:
    """The settings, rates left open, that the trials for `run` have; None where the grid asks for no search.

    A bottleneck's size, exits that build on one another, exit 0 and the depth of a single exit share the rates of the
    plain method. A placement has its own, for a placement is what Table 2 compares, and so has a type of exit.
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
    """The trials that can be run now, and all rates that are in the race.

    Adapter rates first, with the first of the backbone rates; then the other backbone rates, with the best adapter
    rate.
    """
    search = settings.search
    assert search is not None
    adapter, backbone = _choices(settings, search, base["mode"])
    race = [(a, backbone[0]) for a in adapter]
    if not _missing(base, race, store):
        best = max(race, key=lambda rates: _score(base, rates, store))
        race += [(best[0], b) for b in backbone[1:]]
    return _missing(base, race, store), race


def choose(settings: Settings, run: Run, store: Store) -> tuple[dict[str, Any], str]:
    """The run's settings with its learning rates, and where these are from: `optuna`, `search` or `default`.

    While trials are missing, the default rates are given.
    """
    base = trial_base(settings, run.settings)
    tuned = store.tuned(tuned_name(run.settings))
    if tuned is not None:
        best = {k: tuned["best"][k] for k in _TUNED if k in tuned["best"]}
        settled = with_rates(run.settings, default_rates(settings, run.settings["mode"]))
        activation = best.pop("activation", settled["adapter"]["activation"])
        return {**settled, **best, "adapter": {**settled["adapter"], "activation": activation}}, "optuna"
    if base is not None:
        missing, race = trials(settings, base, store)
        if not missing:
            return with_rates(run.settings, max(race, key=lambda rates: _score(base, rates, store))), "search"
    return with_rates(run.settings, default_rates(settings, run.settings["mode"])), "default"


def tuned_name(run: dict[str, Any]) -> str:
    """What an optuna search is stored under."""
    method = METHODS[run["method"]].rates_of or run["method"]
    parts = [run["task"], run["backbone"], run["mode"], method]
    return "-".join([*parts, *(str(v) for k, v in sorted(run["variant"].items()) if k == "placement")])


def with_rates(run: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """The settings with learning rates."""
    return {**run, "adapter_lr": rates[0], "backbone_lr": rates[1]}


def race_table(settings: Settings, base: dict[str, Any], store: Store) -> dict[Rates, float]:
    """Rates -> S-avg on validation data, of the trials that are done."""
    _, race = trials(settings, base, store)
    return {rates: _score(base, rates, store) for rates in race if store.read(with_rates(base, rates)) is not None}


def _choices(settings: Settings, search: Search, mode: str) -> tuple[list[float], list[float]]:
    backbone = [] if mode == "frozen" else search.backbone_lr.get(mode, [])
    return search.adapter_lr[mode], backbone or [default_rates(settings, mode)[1]]


def _missing(base: dict[str, Any], race: list[Rates], store: Store) -> list[dict[str, Any]]:
    wanted = [with_rates(base, rates) for rates in race]
    return [trial for trial in wanted if store.read(trial) is None]


def _score(base: dict[str, Any], rates: Rates, store: Store) -> float:
    found = store.read(with_rates(base, rates))
    assert found is not None
    return float(found["scores"]["validation"]["avg"])
