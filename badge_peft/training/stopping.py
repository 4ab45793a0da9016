"""Early stopping that a resumed training goes on with."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which counts on from the checkpoint that a training is resumed from.

    Trainer saves the counter in every checkpoint, but reads it back only with
    `restore_callback_states_from_checkpoint`, and then the patience with it.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the counter of the state, which is the checkpoint's own where there is one."""
        super().on_train_begin(args, state, control, **kwargs)
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(stored, dict):
            self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]
