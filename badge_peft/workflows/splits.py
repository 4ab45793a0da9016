"""Rows that train and rows that do not, with no text in both."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from badge_peft.workflows.data import TextDataset, pick_split, read_examples
from badge_peft.workflows.settings import TrainColumns
from badge_peft.workflows.sources import read_source

SPLITS = ("train", "validation", "test")
EVAL_SHARE = 0.2  # of the texts, to evaluate and calibrate on
_EVAL_FRACTION = 0.16  # of a source that has not been split, for each of validation and test
Key = tuple[str, ...]  # of a text, or a pair of them: see `TextDataset.keys`
_VALIDATION = ("validation", "dev", "valid", "val")


def read_training_data(data: str, columns: TrainColumns, seed: int) -> tuple[TextDataset, TextDataset]:
    """Training rows and evaluation rows, those of a split or a file of their own, or held out."""
    examples, held_out = read_parts(data, columns)
    if columns.max_rows is not None and len(examples) > columns.max_rows:
        examples = examples.select(random.Random(seed).sample(range(len(examples)), columns.max_rows))
    if held_out is None:
        return hold_out(examples, columns.eval_share or EVAL_SHARE, seed)
    known = set(held_out.keys())
    others = examples.select([i for i, key in enumerate(examples.keys()) if key not in known])
    if not len(others):
        raise ValueError(f"every text of {data} is among the evaluation texts too: nothing is left to train.")
    if len(others) < len(examples):
        warnings.warn(
            f"{len(examples) - len(others)} of {len(examples)} rows are not trained on: their texts are among the "
            "evaluation texts, too.",
            stacklevel=2,
        )
    return others, held_out


def read_parts(data: str, columns: TrainColumns) -> tuple[TextDataset, TextDataset | None]:
    """Training rows, and those of the data or split to calibrate on: what is asked for, else the validation split of
    the data, unless a share of the training rows is asked for; None where some are to be held out."""
    splits = read_source(data, columns.dataset_config)
    examples = pick_split(splits, data, columns, training=True)
    wanted = columns.eval_split
    if columns.eval_data is not None:
        return examples, read_examples(columns.eval_data, replace(columns, split=wanted))
    if wanted is None and columns.eval_share is None:
        wanted = next((name for name in splits if name != columns.split and name.startswith(_VALIDATION)), None)
    return examples, None if wanted is None else pick_split(splits, data, replace(columns, split=wanted))


def hold_out(examples: TextDataset, fraction: float, seed: int) -> tuple[TextDataset, TextDataset]:
    """Training rows, and a `fraction` in (0, 1) of the texts for evaluation; no text is in both, and no class is in
    the second alone."""
    keys = examples.keys()
    different = list(dict.fromkeys(keys))
    random.Random(seed).shuffle(different)
    count = max(1, round(fraction * len(different)))
    if len(different) <= count:
        raise ValueError(
            f"there are too few different texts to hold some out: {len(different)}. Give more, or a separate file "
            "for the calibration with --eval-data."
        )
    held_out = set(different[:count])
    held_out -= _needed(examples, keys, held_out)
    parts: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        parts[key in held_out].append(i)
    return examples.select(parts[0]), examples.select(parts[1])


def _needed(examples: TextDataset, keys: list[Key], held_out: set[Key]) -> set[Key]:
    """Of the texts in `held_out` the first of each class that no other text has. Values on a scale are no classes:
    where that would take half of the texts, none."""
    rows = [(y, key) for classes, key in zip(examples.classes(), keys, strict=False) for y in classes]
    trained = {label for label, key in rows if key not in held_out}
    needed = {label: key for label, key in reversed(rows) if label not in trained}
    return set(needed.values()) if 2 * len(needed) <= len(held_out) else set()


def split_in_three(
    source: Mapping[str, TextDataset], seed: int = 0, max_train: int | None = None, max_eval: int | None = None
) -> dict[str, TextDataset]:
    """`train`, `validation` and `test` of labeled rows, with no text twice.

    Splits that the source has are kept; a validation split that it lacks is cut from its training rows, a test split
    that it lacks too (where the source has only training and validation rows, the latter become the test split, as is
    usual where test labels are hidden). Of several rows with the same text the first counts, and a text of the test
    split never trains. All three are shuffled, and the first rows taken."""
    named = _named(source)
    seen: set[tuple[str, ...]] = set()
    parts = {split: _unique(named[split], seen) for split in reversed(SPLITS) if split in named}
    total, left = (sum(map(len, rows.values())) for rows in (named, parts))
    if left < total:
        warnings.warn(f"{total - left} of {total} rows are left out: their texts are there twice.", stacklevel=2)
    rng = random.Random(seed)
    shuffled = {split: part.select(rng.sample(range(len(part)), len(part))) for split, part in parts.items()}
    for split in ("test", "validation"):
        if split not in shuffled:
            count = max(1, round(_EVAL_FRACTION * len(parts["train"])))
            cut = shuffled["train"]
            rest = range(len(shuffled["train"]))
            count = count if max_eval is None else min(count, max_eval)
            shuffled[split], shuffled["train"] = cut.select(rest[:count]), cut.select(rest[count:])
    limits = {"train": max_train, "validation": max_eval, "test": max_eval}
    for split in SPLITS:
        if not len(shuffled[split]):
            raise ValueError(
                f"there are too few different texts for a {split} split: {sum(map(len, parts.values()))} in all."
            )
    found = {split: shuffled[split].select(range(len(shuffled[split]))[: limits[split]]) for split in SPLITS}
    trained = set(_labels(found["train"]))
    missing = [y for part in found.values() for y in _labels(part) if y not in trained]
    if missing:
        label = min(missing, key=str)
        names = found["train"].class_names
        raise ValueError(
            f"no training row has the label {names[label] if names else label!r}: it is too rare for three splits. "
            "Leave it out."
        )
    return found


def _labels(examples: TextDataset) -> list[Any]:
    """Of all rows; where a row has several, each of them."""
    if examples.tagged:
        return [kind for kinds in examples.classes() for kind in kinds]
    rows = [label if isinstance(label, list) else [label] for label in examples.labels or []]
    return [label for row in rows for label in row]


def _named(source: Mapping[str, TextDataset]) -> dict[str, TextDataset]:
    """The source's splits under our names."""
    if len(source) == 1:
        return {"train": next(iter(source.values()))}
    train = [part for name, part in source.items() if name.startswith("train")]
    validation = [part for name, part in source.items() if name.startswith(_VALIDATION)]
    test = [part for name, part in source.items() if name.startswith("test")]
    if not train:
        raise ValueError(f"the data set has no training split, only {', '.join(source)}.")
    if not test:
        validation, test = [], validation
    found = {"train": train, "validation": validation, "test": test}
    return {name: _joined(parts) for name, parts in found.items() if parts}


def _joined(parts: list[TextDataset]) -> TextDataset:
    """The rows of all parts, with everything that belongs to a row. What rows were called in each part is dropped: two
    would have one name."""
    first, *others = parts
    columns = ("texts", "pairs", "labels", "query_ids", "words")
    rows: dict[str, Any] = {
        name: None if getattr(first, name) is None else [x for part in parts for x in getattr(part, name)]
        for name in columns
    }
    return replace(first, **rows, numbers=None if others else first.numbers)


def _unique(examples: TextDataset, seen: set[tuple[str, ...]]) -> TextDataset:
    """The first row of each text that is not in `seen`, which these are added to."""
    rows = {key: i for i, key in reversed([*enumerate(examples.keys())]) if key not in seen}
    seen.update(rows)
    return examples.select(sorted(rows.values()))
