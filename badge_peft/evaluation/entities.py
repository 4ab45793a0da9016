"""Entities of tags (IOB2): what a text names, from where to where; and how many of them two taggings share.

Entities are read as the CoNLL evaluation reads them, and `seqeval` by default: one begins at B-x, and also at an I-x
that continues none of its kind, since a model may answer so. Source: Tjong Kim Sang and De Meulder, "Introduction to
the CoNLL-2003 Shared Task", 2003, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from badge_peft.evaluation.units import Units

Array = np.ndarray
OUTSIDE = "O"


def tag_type(tag: str) -> str | None:
    """The x of B-x and I-x; None of O.

    Raises:
        ValueError: it is no tag of IOB2.
    """
    prefix, dash, kind = tag.partition("-")
    if tag == OUTSIDE:
        return None
    if prefix not in ("B", "I") or not dash or not kind:
        raise ValueError(f"{tag!r} is no IOB2 tag: it must be O, B-x or I-x, with a kind of entity for x.")
    return kind


def are_tags(names: Sequence[str]) -> bool:
    """Whether all of `names` are tags of IOB2."""
    try:
        return any(tag_type(name) is not None for name in names)
    except ValueError:
        return False


class EntityReader:
    """Reads entities out of class numbers.

    Args:
        names: Tags of the K classes.

    Raises:
        ValueError: one of them is no tag of IOB2.
    """

    def __init__(self, names: Sequence[str]) -> None:
        kinds = [tag_type(name) for name in names]
        self.kinds = sorted({kind for kind in kinds if kind is not None})
        numbers = {kind: i for i, kind in enumerate(self.kinds)}
        # one class more, for a label that the model lacks: an entity that no answer has
        self.types = np.array([-1 if kind is None else numbers[kind] for kind in kinds] + [len(numbers)])
        self.begins = np.array([name.startswith("B-") for name in names] + [True])

    def counts(self, predictions: Array, labels: Array, units: Units) -> tuple[Array, Array, Array]:
        """[U] each: how many entities both taggings have, the predictions, and the labels.

        Args:
            predictions: [N] class numbers.
            labels: [N], the same of the right answers.
            units: The texts of these tokens.
        """
        (starts, ends, types), (true_starts, true_ends, true_types) = (
            self._entities(numbers, units.first) for numbers in (predictions, labels)
        )
        both = starts & true_starts & (ends == true_ends) & (types == true_types)
        found, predicted, true = (units.total(marks.astype(np.int64)) for marks in (both, starts, true_starts))
        return found, predicted, true

    def entities(self, numbers: Array) -> list[tuple[int, int, str]]:
        """Of class numbers [N] of one text: each entity's first place, the one behind its last, and its kind."""
        first = np.arange(len(numbers)) == 0
        starts, ends, types = self._entities(numbers, first)
        return [(int(i), int(ends[i]), self.kinds[types[i]]) for i in np.flatnonzero(starts)]

    def _entities(self, numbers: Array, first: Array) -> tuple[Array, Array, Array]:
        """[N] bool, where one begins; [N], the place behind the end of one that begins here; [N], the type or -1."""
        numbers = np.where(numbers < 0, len(self.types) - 1, numbers)
        types = self.types[numbers]
        before = np.append(-1, types[:-1])
        before[first] = -1
        starts = (types >= 0) & (self.begins[numbers] | (before != types))
        stops = np.flatnonzero(starts | (types < 0) | first)  # where no entity goes on
        ends = np.append(stops, len(types))[np.searchsorted(stops, np.arange(len(types)), side="right")]
        return starts, ends, types
