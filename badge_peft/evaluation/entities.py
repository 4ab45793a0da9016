"""Entities of tags: what a text names, from where to where; and how many of them two taggings share.

Tags are those of IOB1 and IOB2, IOBES, or BILOU, whose L and U are E and S. Entities are read as the CoNLL evaluation
reads them, and `seqeval` by default: one begins at B-x or S-x, behind E-x or S-x, and also where a tag continues none
of its kind, since a model may answer so. Source: Tjong Kim Sang and De Meulder, "Introduction to
the CoNLL-2003 Shared Task", 2003, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from badge_peft.evaluation.exit_logits import Units

Array = np.ndarray
OUTSIDE = "O"
SCHEMES = ("BI", "BIES", "BILU")  # prefixes: IOB1 and IOB2; IOBES (and IOE); BILOU


def scheme_of(names: Iterable[str]) -> str | None:
    """The prefixes of the scheme that `names` are tags of: one of `SCHEMES`; None where they name no entities."""
    parts = [name.partition("-") for name in names if name != OUTSIDE]
    if not parts or not all(kind for _, _, kind in parts):
        return None
    return next((scheme for scheme in SCHEMES if {prefix for prefix, _, _ in parts} <= set(scheme)), None)


def kind_of(tag: str) -> str | None:
    """The x of B-x, I-x, ...; None of O; any other tag is its own kind."""
    prefix, _, kind = tag.partition("-")
    if tag == OUTSIDE:
        return None
    return kind if kind and prefix in set().union(*SCHEMES) else tag


def in_iob2(tags: Sequence[str], names: Sequence[str]) -> list[str]:
    """The tags of one text with B- where an entity begins and I- where it goes on; where `names`, all tags that there
    are, name no entities, each but O begins one."""
    if scheme_of(names) is None:
        return [tag if tag == OUTSIDE else f"B-{tag}" for tag in tags]
    numbers = {name: i for i, name in enumerate(names)}
    found = [OUTSIDE] * len(tags)
    for first, end, kind in EntityReader(names).entities(np.array([numbers[tag] for tag in tags], dtype=int)):
        found[first:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - first - 1)]
    return found


class EntityReader:
    """Reads entities out of class numbers, by the K tags of a scheme in `SCHEMES`."""

    def __init__(self, names: Sequence[str]) -> None:
        kinds = [kind_of(name) for name in names]
        self.kinds = sorted({kind for kind in kinds if kind is not None})
        numbers = {kind: i for i, kind in enumerate(self.kinds)}
        # one class more, for a label that the model lacks: an entity that no answer has
        self.types = np.array([-1 if kind is None else numbers[kind] for kind in kinds] + [len(numbers)])
        self.begins, self.ends = (
            np.array([name[0] in prefixes and name != OUTSIDE for name in names] + [True])
            for prefixes in ("BSU", "ELSU")
        )

    def counts(self, predictions: Array, labels: Array, units: Units) -> tuple[Array, Array, Array]:
        """[U] each: how many entities both class numbers [N] have, the predictions, and the labels."""
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
        ended = np.append(False, self.ends[numbers[:-1]])
        starts = (types >= 0) & (self.begins[numbers] | ended | (before != types))
        stops = np.flatnonzero(starts | (types < 0) | first)  # where no entity goes on
        ends = np.append(stops, len(types))[np.searchsorted(stops, np.arange(len(types)), side="right")]
        return starts, ends, types
