"""`split_texts`: train, validation and test, with no text twice."""

from __future__ import annotations

import random

from datasets import Dataset, DatasetDict, concatenate_datasets

SPLITS = ("train", "validation", "test")
SHARES = {"validation": 0.16, "test": 0.16}  # of a source that has not been split
_VALIDATION = ("validation", "dev", "valid", "val")


def split_texts(
    data: DatasetDict,
    seed: int = 0,
    max_train: int | None = None,
    max_eval: int | None = None,
) -> DatasetDict:
    """Splits labelled texts into `train`, `validation` and `test`, with no text in two of them or twice in one.

    Splits that the source has are kept; a validation split that it lacks is cut from its training rows, a test split
    that it lacks too (where the source has only training and validation rows, the latter become the test split, as is
    usual where test labels are hidden). Two texts are the same when they differ in case and white space at most; of
    several, the first counts, and a text of the test split never trains.

    Args:
        data: Splits with the columns `text` and `label`, from `load_text_dataset`.
        seed: The same seed gives the same splits.
        max_train: At most this many training rows; None takes all.
        max_eval: At most this many rows in each of the other two.

    Returns:
        The three splits, shuffled.

    Raises:
        ValueError: too few different texts for three splits, or a class that the training rows lack.
    """
    named = _named(data)
    seen: set[str] = set()
    parts = {split: _unique(named[split], seen) for split in reversed(SPLITS) if split in named}
    rng = random.Random(seed)
    rows = {split: rng.sample(range(len(part)), len(part)) for split, part in parts.items()}
    pieces: dict[str, tuple[Dataset, list[int]]] = {split: (parts[split], rows[split]) for split in parts}
    for split in ("test", "validation"):
        if split not in pieces:
            source, order = pieces["train"]
            count = max(1, round(SHARES[split] * len(source)))
            if max_eval is not None:
                count = min(count, max_eval)
            pieces[split], pieces["train"] = (source, order[:count]), (source, order[count:])
    limits = {"train": max_train, "validation": max_eval, "test": max_eval}
    result = DatasetDict()
    for split in SPLITS:
        source, order = pieces[split]
        if not order:
            raise ValueError(
                f"there are too few different texts for a {split} split: {sum(map(len, parts.values()))} in all."
            )
        result[split] = source.select(order[: limits[split]])
    _check_classes(result)
    return result


def _named(data: DatasetDict) -> dict[str, Dataset]:
    """The source's splits under our names."""
    if len(data) == 1:
        return {"train": next(iter(data.values()))}
    train = [data[split] for split in data if split.startswith("train")]
    validation = [data[split] for split in data if split.startswith(_VALIDATION)]
    test = [data[split] for split in data if split.startswith("test")]
    if not train:
        raise ValueError(f"the data set has no training split, only {', '.join(data)}.")
    if not test:
        validation, test = [], validation
    found = {"train": train, "validation": validation, "test": test}
    return {split: concatenate_datasets(parts) for split, parts in found.items() if parts}


def _unique(data: Dataset, seen: set[str]) -> Dataset:
    """The rows whose text is not in `seen`, which they are added to."""
    keep = []
    for i, text in enumerate(data["text"][:]):
        key = " ".join(text.split()).casefold()
        if key not in seen:
            seen.add(key)
            keep.append(i)
    return data.select(keep)


def _check_classes(splits: DatasetDict) -> None:
    missing = {y for data in splits.values() for y in data["label"][:]} - set(splits["train"]["label"][:])
    if missing:
        name = splits["train"].features["label"].int2str(min(missing))
        raise ValueError(f"no training row has the label {name!r}: it is too rare for three splits. Leave it out.")
