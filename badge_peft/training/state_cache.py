"""`StateCache`: whether a trainer keeps the states of its rows, and which batches find them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    default_data_collator,
)

from badge_peft.early_exit.cached_states import CachedStates, texts_of
from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.early_exit.state_passes import RecordingPass
from badge_peft.training.caching import BATCH_SIZE, CannotCache, StatePasses, backbone_of, check_backbone
from badge_peft.training.objectives import GROUPS
from badge_peft.training.passes import GradientEquilibriumPass
from badge_peft.training.ranking import QueryCollator
from badge_peft.training.rows import NumberedCollator, NumberedRows, flat_rows, holds_batches
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
        self._known: list[tuple[Any, CachedStates, dict[str, Any]]] = []  # of a data set, with their report
        self._is_kept = False

    @contextmanager
    def training_rows(self, trainer: Any) -> Iterator[None]:
        """Inside, the training rows come with their numbers where their states are kept. These are computed now, if
        they have to be."""
        rows = trainer.train_dataset
        reason = _reason(trainer, self._is_kept)
        try:
            self.training = None if reason else self._states_of(rows, trainer, self.given)
        except CannotCache as error:
            reason = str(error)
        except OSError as error:
            reason = f"there is no room for them ({error})"
        if reason is not None:
            self.training, self.report = None, {"kept": False, "reason": reason}
            if trainer.args.cache_states is True:
                raise ValueError(
                    f"cache_states=True is not possible: {reason}. Take 'auto', which trains without the states then."
                )
            logger.info("states are not cached: %s.", reason)
            yield
            return
        with _numbered(trainer, rows) as trainer.train_dataset:
            try:
                yield
            finally:
                trainer.train_dataset = rows

    @contextmanager
    def evaluation_rows(self, trainer: Any, rows: Any) -> Iterator[Any]:
        """Gives `rows`, with their numbers where states are kept: as it is one pass, after which each evaluation of
        the training costs next to nothing."""
        found = trainer.eval_dataset if rows is None else rows
        found = trainer.eval_dataset[found] if isinstance(found, str) else found
        self.evaluation = None
        # Trainer keeps loaders with such workers, several sets that are handed to it under one name
        kept = trainer.args.dataloader_persistent_workers
        if self.training is not None and not kept and has_rows(found):
            try:
                self.evaluation = self._states_of(found, trainer)
            except (CannotCache, OSError) as error:
                logger.info("states of evaluation rows are not cached: %s.", error)
        if self.evaluation is None:
            yield rows
            return
        with _numbered(trainer, found) as numbered:
            yield numbered

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
            for _, states, _ in self._known:
                if states is not self.given:
                    states.close()
            self._known.clear()

    def _states_of(self, rows: Any, trainer: Any, given: CachedStates | None = None) -> CachedStates:
        """The states of a data set: those that are known, as long as they fit the model, those given, or new ones."""
        check_backbone(trainer.badge)  # states of a stage before may be known
        args, trains = trainer.args, rows is trainer.train_dataset
        for known in self._known:
            _, states, report = known
            if known[0] is rows:
                if _misfit(states, trainer) is None and report.get("dtype", args.cache_dtype) == args.cache_dtype:
                    self.report = report if trains else self.report
                    return states
                if states is not self.given:
                    states.close()
                self._known.remove(known)
                break
        plain, collate = without_unused_columns(trainer, rows)
        features = [{k: v for k, v in row.items() if k != GROUPS} for row in flat_rows(plain)]
        if isinstance(collate, QueryCollator):
            collate = collate.pad
        if given is not None:
            misfit = _misfit(given, trainer)
            if misfit is None and given.texts != texts_of(features):
                misfit = "the states are those of other texts"
            if misfit is not None:
                raise CannotCache(misfit)
            states, report = given, {"kept": True, "bytes": given.nbytes, "where": "given"}
        else:
            folder, dtype = Path(str(args.output_dir)), args.cache_dtype
            room = args.cache_memory_gb - sum(known.nbytes for _, known, _ in self._known if not known.is_mapped) / 1e9
            passes = StatePasses(trainer.badge, features, collate, trainer.accelerator.autocast)
            states = passes.collect(BATCH_SIZE, dtype, room, folder, not args.disable_tqdm)
            place = str(folder if states.is_mapped else "memory")
            report = {"kept": True, "dtype": dtype, "bytes": states.nbytes, "where": place}
            size = states.nbytes / 1e9
            logger.info("states of %d rows are cached as %s: %.2f GB in %s.", len(features), dtype, size, place)
        self.report = report if trains else self.report
        self._known.append((rows, states, report))
        return states


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


@contextmanager
def _numbered(trainer: Any, rows: Any) -> Iterator[NumberedRows]:
    """The rows with their numbers; inside, the trainer's collator takes such rows."""
    before = trainer.data_collator
    plain, collate = without_unused_columns(trainer, rows)
    trainer.data_collator = NumberedCollator(collate)
    try:
        yield NumberedRows(plain)
    finally:
        trainer.data_collator = before


def without_unused_columns(trainer: Any, rows: Any) -> tuple[Any, Any]:
    """Rows and collator as Trainer itself would give them to its loader."""
    collate = trainer.data_collator
    if isinstance(rows, datasets.Dataset):
        return trainer._remove_unused_columns(rows, description=""), collate
    return rows, trainer._get_collator_with_removed_columns(collate, description="")
