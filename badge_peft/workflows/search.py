"""`Search`: adapters with other settings, all on the same cached states, so that each takes seconds.

A fifth of the training rows chooses the settings; the others train. What a trial is worth is S-avg there, or, for
speed, the largest share of blocks saved by an exit rule that scores no less than the best exit of the first trial, the
settings as they were given, minus the drop that is allowed: so no adapter looks fast because its last exit is poor. An
adapter that never scores as much is worth less than 0: by how much it falls short.

The study is optuna's, stored in a file after every trial: a search that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from badge_peft.early_exit.cached_states import CachedStates, texts_of
from badge_peft.evaluation import ExitLogits, collect_exit_logits, exit_scores, sweep
from badge_peft.model import get_badge_model
from badge_peft.training import cache_states
from badge_peft.training.finite import TrainingStopped
from badge_peft.workflows.base_model import Base, add_exits
from badge_peft.workflows.evaluate import resolve_metric
from badge_peft.workflows.fit import collator, train_exits
from badge_peft.workflows.search_picture import SEARCH_PICTURE, draw_search
from badge_peft.workflows.search_space import SearchSpace
from badge_peft.workflows.settings import STUDY, ExitOptions, TrainSettings

_SHARE, _MOST = 0.2, 2000  # of the training rows, to choose by
# what a study may differ in and be gone on with
_NOT_OF_STUDY = ("output_dir", "overwrite", "trials", "latency")


class Search:
    """The trials of one command.

    Args:
        base: The model; between two trials it has no adapter.
        rows: All training rows, encoded.
        tokenizer: Pads.
        settings: What was asked for; what is not searched stays.
        learns_labels: Whether from labels.
        model_name: Of the model.

    Raises:
        ValueError: there are too few rows.
    """

    def __init__(
        self, base: Base, rows: Dataset, tokenizer: Any, settings: TrainSettings, learns_labels: bool, model_name: str
    ) -> None:
        self.base = base
        self.rows = rows
        self.tokenizer = tokenizer
        self.settings = settings
        self.learns_labels = learns_labels
        self.metric = resolve_metric(settings.metric, base.labels.problem_type, len(base.labels.names), base.tags)
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
        identity = [model_name, asked, labels, [text.hex() for text in texts]]
        self._identity = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()

    def choose_form(
        self, choose: Callable[[], tuple[TrainSettings, list[dict[str, Any]]]]
    ) -> tuple[TrainSettings, list[dict[str, Any]]]:
        """What `choose` chooses by the clock, or what it chose for the search that goes on.

        Raises:
            ValueError: the folder holds a study of other settings or data.
        """
        study = self._study()
        if "forms" not in study.user_attrs:
            settings, forms = choose()
            study.set_user_attr("exits", vars(settings.exits))
            study.set_user_attr("forms", forms)
        self.settings = replace(self.settings, exits=ExitOptions(**study.user_attrs["exits"]))
        self.space = SearchSpace(self.settings, self.learns_labels)
        return self.settings, study.user_attrs["forms"]

    def run(self, tell: Callable[[str], None]) -> tuple[TrainSettings, CachedStates, dict[str, Any]]:
        """Tries what is still to be tried.

        Args:
            tell: Is given a line for each trial.

        Returns:
            The settings with the best values in them, the states of all training rows, and what the report says.

        Raises:
            ValueError: the folder holds a study of other settings or data, or training with the settings as they are
                given fails.
        """
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
                study.enqueue_trial(self.space.given())
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
        worth = [{"value": trial.value, "params": trial.params} for trial in _done(study) if trial.value is not None]
        draw_search(worth, self.settings.search.search_for, Path(str(self.settings.output_dir), SEARCH_PICTURE))
        found = {
            "trials": len(_done(study)),
            "for": self.settings.search.search_for,
            "rows": len(self.held),
            "given": _done(study)[0].value,
            "value": best.value,
            "best": best.params,
        }
        return self.space.settings_of(best.params), states, found

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
                model, self.rows, data_collator=collator(self.base.reads_tokens, self.tokenizer), progress=True
            )
        finally:
            get_badge_model(model).unload()

    def _value(self, study: Any, trial: Any, fit: CachedStates, held: CachedStates) -> float:
        """Trains one adapter, and says what it is worth."""
        import optuna

        settings = self.space.settings_of(self.space.suggest(trial))
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
        reached = [point.layer_speedup for point in points if point.score >= target]
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
