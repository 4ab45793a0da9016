"""`Search`: adapters with other settings, all on the same cached states, so that each takes seconds.

A fifth of the training rows chooses the settings; the others train. What a trial is worth is S-avg there, or, for
speed, the largest share of blocks saved by a policy that scores no less than the best exit of the first trial, the
settings as they were given, minus the drop that is allowed: so no adapter looks fast because its last exit is poor. An
adapter that never scores as much is worth less than 0: by how much it falls short.

The study is optuna's, stored in a file after every trial: a search that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from badge_peft.early_exit.cached_states import CachedStates, texts_of
from badge_peft.evaluation import ExitLogits, collect_exit_logits, exit_scores, sweep
from badge_peft.model import get_badge_model
from badge_peft.training import cache_states
from badge_peft.training.parameters import ADAPTER_LR
from badge_peft.training.preflight import TrainingStopped
from badge_peft.tuner.backbone import fingerprint
from badge_peft.workflows.base_model import Base, add_exits
from badge_peft.workflows.fit import collator, train_exits
from badge_peft.workflows.settings import SEARCH_PICTURE, STUDY, ExitOptions, TrainSettings

_SHARE, _MOST = 0.2, 2000  # of the training rows, to choose by
# what a study may differ in and be gone on with
_NOT_OF_STUDY = ("output_dir", "overwrite", "trials", "latency")
_RATES = (1e-3, 5e-2)
_OF_EXITS: dict[str, tuple[Any, ...]] = {
    "r": (4, 8, 16, 32, 64),
    "activation": ("gelu", "relu", "tanh", "identity"),
}
_OF_TRAINING: dict[str, tuple[Any, ...]] = {
    "exit_weights": ("uniform", "linear"),
    "objective": ("joint", "alternating", "two_stage"),
}
_WORTH = {"score": "S-avg on held-out rows", "speed": "share of blocks saved"}


class Search:
    """The trials of one command."""

    def __init__(
        self, base: Base, rows: Dataset, tokenizer: Any, settings: TrainSettings, learns_labels: bool, model_name: str
    ) -> None:
        self.base = base
        self.rows = rows
        self.tokenizer = tokenizer
        self.settings = settings
        self.learns_labels = learns_labels
        self.metric = base.labels.metric(settings.metric)
        texts = texts_of(rows)
        generator = torch.Generator().manual_seed(settings.training.seed)
        order = torch.randperm(len(rows), generator=generator).tolist()
        held = {texts[i] for i in order[: min(_MOST, max(1, round(_SHARE * len(rows))))]}
        self.held = [i for i, text in enumerate(texts) if text in held]
        self.fit = [i for i, text in enumerate(texts) if text not in held]
        if not self.fit:
            raise ValueError(f"{len(rows)} training rows are too few for a search: leave --trials out.")
        asked = {name: value for name, value in settings.to_dict().items() if name not in _NOT_OF_STUDY}
        labels = list(rows["labels"]) if "labels" in rows.column_names else None
        identity = [model_name, fingerprint(base.model), asked, labels, [text.hex() for text in texts]]
        self._identity = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()

    def choose_form(
        self, choose: Callable[[], tuple[TrainSettings, list[dict[str, Any]]]]
    ) -> tuple[TrainSettings, list[dict[str, Any]]]:
        """What `choose` chooses by the clock, or what it chose for the search that goes on."""
        study = self._study()
        if "forms" not in study.user_attrs:
            settings, forms = choose()
            study.set_user_attr("exits", vars(settings.exits))
            study.set_user_attr("forms", forms)
        self.settings = replace(self.settings, exits=ExitOptions(**study.user_attrs["exits"]))
        self.choices = choices(self.settings, self.learns_labels)
        return self.settings, study.user_attrs["forms"]

    def run(self, tell: Callable[[str], None]) -> tuple[TrainSettings, CachedStates, dict[str, Any]]:
        """Tries what is still to be tried, and tells a line of each trial: the settings with the best values in them,
        the states of all training rows, and what the report says."""
        import optuna

        study = self._study()
        states = self._states()
        try:
            parts = states.select(self.fit), states.select(self.held)
            count = self.settings.search.trials

            def report(study: Any, trial: Any) -> None:
                values = ", ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
                worth = "stopped" if trial.value is None else self.show(trial.value)
                best = self.show(study.best_value)
                tell(f"trial {len(_done(study))} of {count}: {worth} with {values}; best {best}")

            if not _done(study) and not any(trial.state.name == "WAITING" for trial in study.trials):
                given = {name: values[0] for name, values in self.choices.items()}
                study.enqueue_trial({**given, "adapter_lr": self._rate()})
            if len(_done(study)) < count:
                with _silent(optuna):
                    study.optimize(
                        lambda trial: self._value(study, trial, *parts),
                        n_trials=count - len(_done(study)),
                        callbacks=[report],
                    )
        except BaseException:
            states.close()
            raise
        best = study.best_trial
        search_for = self.settings.search.search_for
        _draw(study, _WORTH[search_for], Path(str(self.settings.output_dir), SEARCH_PICTURE))
        found = {
            "trials": len(_done(study)),
            "for": search_for,
            "rows": len(self.held),
            "given": _done(study)[0].value,
            "value": best.value,
            "best": best.params,
        }
        return settings_of(self.settings, best.params), states, found

    def suggest(self, trial: Any) -> dict[str, Any]:
        """The values of an optuna trial."""
        found = {name: trial.suggest_categorical(name, values) for name, values in self.choices.items()}
        low, high = min(self._rate(), _RATES[0]), max(self._rate(), _RATES[1])
        return {**found, "adapter_lr": trial.suggest_float("adapter_lr", low, high, log=True)}

    def _rate(self) -> float:
        rate = self.settings.training.adapter_lr
        return ADAPTER_LR if rate is None else rate

    def show(self, value: float) -> str:
        """What a trial is worth, in words."""
        if self.settings.search.search_for == "score":
            return f"S-avg {value:.4f}"
        return f"{value:.1%} of the blocks saved" if value >= 0 else f"a score {-value:.4f} too low"

    def _study(self) -> Any:
        """The study in the folder, or a new one."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        path = Path(str(self.settings.output_dir), STUDY)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _silent(optuna):
            study = optuna.create_study(
                study_name="badge-peft train",
                storage=JournalStorage(JournalFileBackend(str(path))),
                direction="maximize",
                load_if_exists=True,
            )
        # a search that goes on must not draw what it has tried
        seed = self.settings.training.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
        if study.user_attrs.setdefault("identity", self._identity) != self._identity:
            raise ValueError(
                f"{path} holds the trials of another model, other data or other settings: remove it, or name another "
                "output_dir."
            )
        study.set_user_attr("identity", self._identity)
        return study

    def _states(self) -> CachedStates:
        model = add_exits(self.base, self.settings.exits)
        try:
            return cache_states(
                model, self.rows, data_collator=collator(self.base.labels.tokens, self.tokenizer), progress=True
            )
        finally:
            get_badge_model(model).unload()

    def _value(self, study: Any, trial: Any, fit: CachedStates, held: CachedStates) -> float:
        """Trains one adapter, and says what it is worth."""
        import optuna

        settings = settings_of(self.settings, self.suggest(trial))
        set_seed(settings.training.seed)
        model = add_exits(self.base, settings.exits)
        try:
            rows = self.rows.select(self.fit)
            train_exits(model, rows, self.tokenizer, settings.training, self.learns_labels, fit, progress=False)
            found = collect_exit_logits(model, self.rows.select(self.held), cached_states=held).labeled()
        except TrainingStopped as error:
            if not _done(study):
                raise
            raise optuna.TrialPruned(str(error)) from error
        finally:
            get_badge_model(model).unload()
        return self._worth(study, found)

    def _worth(self, study: Any, found: ExitLogits) -> float:
        scores = exit_scores(found, self.metric)
        if self.settings.search.search_for == "score":
            return scores.avg
        goal = self.settings.goal
        if "target" not in study.user_attrs:
            study.set_user_attr("target", scores.best - float(goal.arguments()["max_score_drop"] or 0))
        target = study.user_attrs["target"]
        points = sweep(found, None if goal.policy == "auto" else [goal.policy], metric=self.metric).points
        reached = [point.blocks_saved for point in points if point.score >= target]
        return max(reached) if reached else max(point.score for point in points) - target


def _done(study: Any) -> list[Any]:
    """The trials that were trained to their end, or stopped as their loss was not finite."""
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


@contextmanager
def _silent(optuna: Any) -> Iterator[None]:
    """Without optuna's own lines."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def choices(settings: TrainSettings, learns_labels: bool) -> dict[str, tuple[Any, ...]]:
    """What is chosen among, the value that was given first. What would change nothing, or cannot be, is left."""
    exits, training = settings.exits, settings.training
    given = {**vars(exits), **vars(training), "exit_weights": training.exit_weights or "uniform"}
    found = dict(_OF_EXITS) if exits.placement != "none" else {}
    if training.objective in _OF_TRAINING["objective"]:
        found["exit_weights"] = _OF_TRAINING["exit_weights"]
        # of exits that share weights, none stays as it is while the others are trained
        if learns_labels and not exits.keep_head and exits.exit_type != "past_future":
            found["objective"] = _OF_TRAINING["objective"]
    return {name: tuple(dict.fromkeys((given[name], *values))) for name, values in found.items()}


def settings_of(settings: TrainSettings, params: dict[str, Any]) -> TrainSettings:
    """What was asked for, with these values in it."""
    exits = {name: value for name, value in params.items() if name in _OF_EXITS}
    others = {name: value for name, value in params.items() if name not in _OF_EXITS}
    training = replace(settings.training, **others)
    return replace(settings, exits=replace(settings.exits, **exits), training=training)


def _draw(study: Any, worth: str, path: Path) -> None:
    """Draws what each trial was worth, by each of its settings; nothing where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_slice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        plot_slice(study, target_name=worth)
    pyplot.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close()
