"""Labels as the data has them to targets that a model learns: mapped to the names that the model knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from badge_peft.workflows.data import TextDataset

_MOST_LABELS = 1000
_LEAVE_OUT = "or leave the labels out (--unlabeled): the exits then learn from the model's own answers"


@dataclass(frozen=True)
class LabelSet:
    """What a model answers with.

    Args:
        names: By number; for regression those of its values.
        problem_type: As transformers has it.
    """

    names: list[str]
    problem_type: str

    @classmethod
    def of_model(cls, config: Any) -> LabelSet:
        """The labels of a model that has been fine-tuned, from its config."""
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        kind = "regression" if len(names) == 1 else "single_label_classification"
        return cls(names, getattr(config, "problem_type", None) or kind)

    @classmethod
    def of_data(cls, rows: TextDataset, problem_type: str | None = None) -> LabelSet:
        """The labels for a new head, from the data: strings by the alphabet, numbers by size; fractions mean
        regression.

        Raises:
            ValueError: there are none, or their number makes no classifier.
        """
        values = [value for value in rows.labels or [] if value is not None]
        if not values:
            raise ValueError(
                "this model has no trained classification head, so it needs labeled rows to learn from: name their "
                "column with --label-column, or give a model that has been fine-tuned."
            )
        if problem_type == "regression" or (problem_type is None and any(isinstance(v, float) for v in values)):
            return cls(["value"], "regression")
        if problem_type == "multi_label_classification" or any(isinstance(v, (list, dict)) for v in values):
            raise ValueError("a new head for several labels per row is not supported: fine-tune the model first.")
        names = rows.class_names or [
            str(v) for v in sorted(set(values), key=lambda v: (isinstance(v, str), v if isinstance(v, str) else +v))
        ]
        if not 2 <= len(names) <= _MOST_LABELS:
            raise ValueError(
                f"the label column {rows.columns.get('label')!r} has {len(names)} different values: a classifier "
                f"needs 2 to {_MOST_LABELS}. Name another with --label-column; for numbers on a scale, --problem-type "
                "regression."
            )
        return cls(names, "single_label_classification")

    def targets(self, rows: TextDataset) -> list[Any] | None:
        """The labels of `rows` as the loss needs them, None in a row without one; None where no row has one.

        Raises:
            ValueError: a label that is not the model's.
        """
        if rows.labels is None:
            return None
        if self.problem_type == "regression":
            return [None if value is None else _number(value, rows) for value in rows.labels]
        several = self.problem_type == "multi_label_classification"
        per_row = [[] if v is None else list(v) if isinstance(v, (list, tuple)) else [v] for v in rows.labels]
        if not several and any(len(values) > 1 for values in per_row):
            raise ValueError(f"column {rows.columns.get('label')!r} has several labels in a row, the model gives one.")
        if several and all(len(v) == len(self.names) and set(v) <= {0, 1} for v in per_row if v):
            return [[float(x) for x in v] if v else None for v in per_row]
        numbers = self._numbers({value for values in per_row for value in values}, rows)
        found = [[numbers[value] for value in values] for values in per_row]
        if not several:
            return [values[0] if values else None for values in found]
        every = range(len(self.names))
        return [
            None if raw is None else [float(i in values) for i in every]
            for raw, values in zip(rows.labels, found, strict=True)
        ]

    def _numbers(self, values: set[Any], rows: TextDataset) -> dict[Any, int]:
        """The number of each raw value, by name; numbers that are no names are taken as they are."""
        folded = {name.casefold() for name in self.names}
        # names that differ in case alone have to be spelled as they are
        fold = str.casefold if len(folded) == len(set(self.names)) else str
        known = {fold(name): i for i, name in enumerate(self.names)}
        spelled = {v: rows.class_names[v] if rows.class_names and isinstance(v, int) else str(v) for v in values}
        found = {v: known[fold(name)] for v, name in spelled.items() if fold(name) in known}
        if len(found) == len(values):
            return found
        whole = all(isinstance(value, int) and 0 <= value < len(self.names) for value in values)
        unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in self.names)
        if whole and (rows.class_names is None or (unnamed and len(rows.class_names) == len(self.names))):
            return {value: int(value) for value in values}
        wrong = sorted(spelled[value] for value in values - found.keys())
        raise ValueError(
            f"the model does not know the labels {', '.join(map(repr, wrong[:5]))}{', ...' if len(wrong) > 5 else ''} "
            f"of column {rows.columns.get('label')!r}; it knows {', '.join(map(repr, self.names[:20]))}. Rename them "
            f"in the data (the model's names, or numbers from 0 to {len(self.names) - 1}), {_LEAVE_OUT}."
        )


def _number(value: Any, rows: TextDataset) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"column {rows.columns.get('label')!r} holds {value!r}, but the model does regression and needs numbers. "
            f"Name another with --label-column, {_LEAVE_OUT}."
        ) from None
