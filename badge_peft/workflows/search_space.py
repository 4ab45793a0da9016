"""`SearchSpace`: among which settings a search chooses. None of them changes which states the exits read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from badge_peft.training.parameters import ADAPTER_LR
from badge_peft.workflows.settings import TrainSettings

_RATES = (1e-3, 5e-2)
_OF_EXITS: dict[str, tuple[Any, ...]] = {
    "r": (4, 8, 16, 32, 64),
    "activation": ("gelu", "relu", "tanh", "identity"),
}
_OF_TRAINING: dict[str, tuple[Any, ...]] = {
    "exit_weights": ("uniform", "linear"),
    "objective": ("joint", "alternating", "two_stage"),
}


class SearchSpace:
    """What is searched, around what was asked for.

    Args:
        settings: What was asked for; the first trial is this.
        learns_labels: Whether the exits learn from labels.
    """

    def __init__(self, settings: TrainSettings, learns_labels: bool) -> None:
        self.settings = settings
        self.learns_labels = learns_labels

    def _choices(self) -> dict[str, tuple[Any, ...]]:
        """What is chosen among, the value that was given first. What would change nothing, or cannot be, is left."""
        exits, training = self.settings.exits, self.settings.training
        given = {**vars(exits), **vars(training), "exit_weights": training.exit_weights or "uniform"}
        found = dict(_OF_EXITS) if exits.placement != "none" else {}
        if training.objective in _OF_TRAINING["objective"]:
            found["exit_weights"] = _OF_TRAINING["exit_weights"]
            # of exits that share weights, none stays as it is while the others are trained
            if self.learns_labels and not exits.keep_head and exits.exit_type != "past_future":
                found["objective"] = _OF_TRAINING["objective"]
        return {name: tuple(dict.fromkeys((given[name], *values))) for name, values in found.items()}

    def suggest(self, trial: Any) -> dict[str, Any]:
        """The values of an optuna trial."""
        found = {name: trial.suggest_categorical(name, values) for name, values in self._choices().items()}
        rate = self._rate()
        low, high = min(rate, _RATES[0]), max(rate, _RATES[1])
        return {**found, "adapter_lr": trial.suggest_float("adapter_lr", low, high, log=True)}

    def given(self) -> dict[str, Any]:
        """The values that were asked for."""
        return {**{name: values[0] for name, values in self._choices().items()}, "adapter_lr": self._rate()}

    def _rate(self) -> float:
        rate = self.settings.training.adapter_lr
        return ADAPTER_LR if rate is None else rate

    def settings_of(self, params: dict[str, Any]) -> TrainSettings:
        """What was asked for, with these values in it."""
        exits = {name: value for name, value in params.items() if name in _OF_EXITS}
        others = {name: value for name, value in params.items() if name not in _OF_EXITS}
        return replace(
            self.settings,
            exits=replace(self.settings.exits, **exits),
            training=replace(self.settings.training, **others),
        )
