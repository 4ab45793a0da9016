"""Callbacks of Trainer: one bar for a whole training, and early stopping that a resumed training goes on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback


class ProgressBar(ProgressCallback):
    """transformers' bar, with the loss (summed over exits) at its end in place of a line for each log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar, and names it."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows the loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, with the patience of `args.early_stopping_patience` (None: it never stops), counting on
    from the checkpoint that a training is resumed from.

    Trainer saves the counter in every checkpoint, but reads it back only with
    `restore_callback_states_from_checkpoint`, and then the patience with it.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the counter of the state, which is the checkpoint's own where there is one."""
        if args.early_stopping_patience is None:
            return
        super().on_train_begin(args, state, control, **kwargs)
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(stored, dict):
            self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Counts evaluations without improvement, and stops when they are as many as the patience."""
        if args.early_stopping_patience is not None:
            self.early_stopping_patience = args.early_stopping_patience
            super().on_evaluate(args, state, control, metrics, **kwargs)


class AtFirstStep(TrainerCallback):
    """Calls a function when a training begins that goes on from no checkpoint."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once the optimizer, the loader and their states are there."""
        if state.global_step == 0:
            self.function()
