"""Trainings on kept states: `StateCache` says whether a trainer keeps those of its rows, and `CachingTrainer` has
batches that find them by their texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    Trainer,
    default_data_collator,
)

from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.early_exit.state_passes import RecordingPass
from badge_peft.training.arguments import MultiExitTrainingArguments
from badge_peft.training.caching import BATCH_SIZE, CannotCache, StatePasses, backbone_of, check_backbone
from badge_peft.training.objectives import GROUPS
from badge_peft.training.passes import GradientEquilibriumPass
from badge_peft.training.ranking import QueryCollator, flat_rows, holds_batches
from badge_peft.training.sampling import same_order
from badge_peft.training.stages import Stage
from badge_peft.utils import distributed

logger = logging.getLogger(__name__)

# what these do between the blocks has no meaning where the blocks take no gradient
_BETWEEN_BLOCKS = (EarlyExitPass.before_block, GradientEquilibriumPass.before_block)
_KNOWN_COLLATORS = (DataCollatorForTokenClassification, DataCollatorWithPadding, DefaultDataCollator)


class StateCache:
    """The states of a trainer's rows, from its first epoch to its last: those of the training rows (`given` ones are
    not closed), of the rows that are evaluated now, and in `report` what is kept and where, or why nothing is."""

    def __init__(self, given: CachedStates | None = None) -> None:
        self.given = given
        self.training: CachedStates | None = None
        self.evaluation: CachedStates | None = None
        self.report: dict[str, Any] = {}
        self._known: dict[int, tuple[Any, CachedStates, dict[str, Any]]] = {}  # of data sets, with their reports
        self._is_kept = False

    def find(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a call of the model with this batch is given besides: the states of its rows, where all are kept."""
        for states in (self.training, self.evaluation):
            rows = None if states is None else states.find(inputs)
            if rows is not None:
                return {"cached_states": states, "cached_rows": rows}
        return {}

    def prepare_training(self, trainer: Any) -> None:
        """Keeps the states of the training rows, where they can be; they are computed now, if they have to be."""
        self.training, reason = None, _reason(trainer, self._is_kept)
        try:
            if reason is None:
                self.training = self._states_of(trainer.train_dataset, trainer, self.given)
        except CannotCache as error:
            reason = str(error)
        except OSError as error:
            reason = f"there is no room for them ({error})"
        if reason is None:
            return
        self.report = {"kept": False, "reason": reason}
        if trainer.args.cache_states is True:
            raise ValueError(
                f"cache_states=True is not possible: {reason}. Take 'auto', which trains without the states then."
            )
        logger.info("states are not cached: %s.", reason)

    def prepare_evaluation(self, trainer: Any, rows: Any) -> None:
        """Keeps those of `rows`, as Trainer names them, where those of the training rows are: as it is one pass, after
        which each evaluation of the training costs next to nothing."""
        rows = trainer.eval_dataset if rows is None else rows
        rows = trainer.eval_dataset[rows] if isinstance(rows, str) else rows
        self.evaluation = None
        if self.training is not None and has_rows(rows):
            try:
                self.evaluation = self._states_of(rows, trainer)
            except (CannotCache, OSError) as error:
                logger.info("states of evaluation rows are not cached: %s.", error)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, `close` does nothing: several trainings use the same states."""
        self._is_kept = True
        try:
            yield
        finally:
            self._is_kept = False
            self.close()

    def close(self) -> None:
        """Ends a training, and gives memory and files back."""
        self.training = self.evaluation = None
        if not self._is_kept:
            for _, states, _ in self._known.values():
                if states is not self.given:
                    states.close()
            self._known.clear()

    def _states_of(self, rows: Any, trainer: Any, given: CachedStates | None = None) -> CachedStates:
        """The states of a data set: those that are known, as long as they fit the model, those given, or new ones."""
        check_backbone(trainer.badge)  # states of a stage before may be known
        dtype = trainer.args.cache_dtype
        _, states, report = self._known.pop(id(rows), (None, None, {}))
        if states is not None and (_misfit(states, trainer) or report.get("dtype", dtype) != dtype):
            if states is not self.given:
                states.close()
            states = None
        if states is None:
            states, report = self._new_states(rows, trainer, given)
        self._known[id(rows)] = rows, states, report
        if rows is trainer.train_dataset:
            self.report = report
        return states

    def _new_states(self, rows: Any, trainer: Any, given: CachedStates | None) -> tuple[CachedStates, dict[str, Any]]:
        plain, collate = without_unused_columns(trainer, rows)
        features = [{k: v for k, v in row.items() if k != GROUPS} for row in flat_rows(plain)]
        if isinstance(collate, QueryCollator):
            collate = collate.pad
        if given is not None:
            misfit = _misfit(given, trainer)
            if misfit is None and not given.have(features):
                misfit = "the states are those of other texts"
            if misfit is not None:
                raise CannotCache(misfit)
            return given, {"kept": True, "bytes": given.nbytes, "where": "given"}
        args = trainer.args
        folder, dtype = Path(str(args.output_dir)), args.cache_dtype
        taken = sum(known.nbytes for _, known, _ in self._known.values() if not known.is_mapped)
        passes = StatePasses(trainer.badge, features, collate, trainer.accelerator.autocast)
        room = args.cache_memory_gb - taken / 1e9
        states = passes.collect(BATCH_SIZE, dtype, room, folder, not args.disable_tqdm)
        place, size = str(folder if states.is_mapped else "memory"), states.nbytes / 1e9
        logger.info("states of %d rows are cached as %s: %.2f GB in %s.", len(features), dtype, size, place)
        return states, {"kept": True, "dtype": dtype, "bytes": states.nbytes, "where": place}


def _misfit(states: CachedStates, trainer: Any) -> str | None:
    """Why states are not those that the model reads."""
    wanted = RecordingPass.of(trainer.badge, {}).plan
    if not states.plan.serves(wanted):
        return f"the adapter reads {wanted}, and the states are {states.plan}"
    if states.backbone != backbone_of(trainer.badge):
        return "the states are those of another backbone"
    return None


def has_rows(rows: Any) -> bool:
    """Whether a data set has rows with numbers and tokens."""
    if isinstance(rows, (IterableDataset, datasets.IterableDataset)) or not hasattr(rows, "__len__"):
        return False
    first = rows[0] if len(rows) else None
    first = first[0] if first and holds_batches(rows) else first
    return isinstance(first, Mapping) and "input_ids" in first


def _reason(trainer: Any, many_trainings: bool) -> str | None:
    """Why the states of a trainer's rows are not the same in every epoch; for "auto", also why they had better not be
    kept."""
    args, exit_pass, collate = trainer.args, trainer.exit_objective.exit_pass, trainer.data_collator
    if isinstance(collate, QueryCollator):
        collate = collate.pad
    if args.cache_states is False:
        return "cache_states=False"
    if not has_rows(trainer.train_dataset):
        return "the training rows are a stream, or have no input_ids"
    if args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha changes the embeddings at every step"
    if exit_pass.before_block not in _BETWEEN_BLOCKS:
        return f"{exit_pass.__name__} changes what goes on between the blocks"
    if args.cache_states is True:
        return None
    if not isinstance(collate, _KNOWN_COLLATORS) and collate is not default_data_collator:
        return f"a data_collator that is not known ({type(collate).__name__}) may change the rows"
    step = args.train_batch_size * args.gradient_accumulation_steps * distributed.rank_world()[1]
    rows = len(trainer.train_dataset)
    read = args.max_steps * step if args.max_steps > 0 else args.num_train_epochs * rows
    starts = args.exit_start == "regression"  # which reads the rows, too
    if read <= rows and not many_trainings and not starts and trainer.num_stages == 1:
        return "each row is read once"
    return None


def without_unused_columns(trainer: Any, rows: Any) -> tuple[Any, Any]:
    """Rows and collator as Trainer itself would give them to its loader."""
    collate = trainer.data_collator
    if isinstance(rows, datasets.Dataset):
        return trainer._remove_unused_columns(rows, description=""), collate
    return rows, trainer._get_collator_with_removed_columns(collate, description="")


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

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Trainer's, which counts those of the whole model; where states are kept no block runs, and it is 0."""
        return 0 if self._cache.training is not None else super().floating_point_ops(inputs)

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; in a training, the states of its rows are kept where they can be."""
        if self._stage is not None:
            self._cache.prepare_training(self)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer's; in a training, the states of its rows are kept where they can be."""
        if self._stage is not None:
            self._cache.prepare_evaluation(self, eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which would cut the last batch to the number of its items, where items are lists of rows."""
        if holds_batches(dataloader.dataset):
            self.gather_function = self.accelerator.gather
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return same_order(super()._get_train_sampler(train_dataset), self.args)
