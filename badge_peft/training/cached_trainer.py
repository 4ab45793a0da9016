"""`CachingTrainer`: a Trainer whose batches say which rows they have, where the states of these rows are kept."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from badge_peft.training.arguments import MultiExitTrainingArguments
from badge_peft.training.rows import ROWS, holds_batches, same_order, unnumbered
from badge_peft.training.stages import Stage
from badge_peft.training.state_cache import StateCache


class CachingTrainer(Trainer):
    """The data loaders of `MultiExitTrainer`."""

    args: MultiExitTrainingArguments
    num_stages = 1
    _stage: Stage | None = None  # the one that runs
    _cache: StateCache

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; where states are kept, all trials train on the same."""
        with self._cache.kept():
            return super().hyperparameter_search(*args, **kwargs)

    @property
    def state_cache(self) -> dict[str, Any]:
        """What the last training kept of its states (`kept`, `dtype`, `bytes`, `where`), or `reason`: why nothing."""
        return self._cache.report

    def cached(self, inputs: dict[str, Any], training: bool) -> dict[str, Any]:
        """What a call of the model with this batch is given besides: the states of its rows, where they are kept.
        Stage 2 of `two_stage` trains a model in evaluation mode, so `training` says whether these are training
        rows."""
        states = self._cache.training if training else self._cache.evaluation
        return {} if states is None or ROWS not in inputs else {"cached_states": states, ROWS: inputs[ROWS]}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Trainer's, which counts those of the whole model; where states are kept no block runs, and it is 0."""
        return 0 if self._cache.training is not None else super().floating_point_ops(inputs)

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; in a training whose states are kept, each batch says which rows it has."""
        if self._stage is None:
            return super().get_train_dataloader()
        with self._cache.training_rows(self):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer's; in a training whose states are kept, each batch says which rows it has."""
        if self._stage is None:
            return super().get_eval_dataloader(eval_dataset)
        with self._cache.evaluation_rows(self, eval_dataset) as rows:
            return super().get_eval_dataloader(rows)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which would cut the last batch to the number of its items, where items are lists of rows."""
        if holds_batches(unnumbered(dataloader.dataset)):
            self.gather_function = self.accelerator.gather
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return same_order(super()._get_train_sampler(unnumbered(train_dataset)), self.args)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super()._get_eval_sampler(unnumbered(eval_dataset))
