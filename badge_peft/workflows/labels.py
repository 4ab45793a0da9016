"""Labels as the data has them to targets that a model learns: mapped to the names that the model knows."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from badge_peft.evaluation import ExitLogits
from badge_peft.evaluation.entities import OUTSIDE, scheme_of
from badge_peft.evaluation.metrics import ENTITY_F1, exit_scores
from badge_peft.utils.problem import UNKNOWN_LABEL, problem_of
from badge_peft.workflows.columns import tag_names
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import encode, encode_tokens

_MOST_LABELS = 1000
_LEAVE_OUT = "or leave the labels out (--unlabeled): the exits then learn from the model's own answers"


@dataclass(frozen=True)
class LabelSet:
    """What a model answers with."""

    names: list[str]  # by number; for regression those of its values
    problem_type: str
    tokens: bool = False  # whether these are tags of tokens

    @classmethod
    def of_model(cls, config: Any, tokens: bool = False) -> LabelSet:
        """The labels of a model that has been fine-tuned, from its config."""
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        kind = "regression" if len(names) == 1 else "single_label_classification"
        return cls(names, getattr(config, "problem_type", None) or kind, tokens)

    @classmethod
    def of_tags(cls, rows: TextDataset) -> LabelSet:
        """The tags for a new head: all that the kinds of entities in the data have in its scheme or, where its tags
        name no entities, those that it has."""
        kinds = {kind for classes in rows.classes() for kind in classes}
        if not kinds:
            raise ValueError(
                "this model has no trained head for tokens, so it needs rows with tags or entities to learn from, and "
                "the data has none: name their column with --label-column."
            )
        if rows.words is None:
            return cls(tag_names(kinds), "single_label_classification", tokens=True)
        tags = {tag for row in rows.labels or [] for tag in row or []}
        scheme = scheme_of(tags)
        if scheme is None and any(tag.startswith(("B-", "I-")) for tag in tags):
            others = sorted(tag for tag in tags if tag != OUTSIDE and not tag.startswith(("B-", "I-")))
            warnings.warn(
                f"{', '.join(others[:5])} and the other tags are of no one scheme (IOB1, IOB2, IOBES, BILOU), so "
                "tokens are scored, and not entities: fix them, if these are meant.",
                stacklevel=2,
            )
        names = sorted(tags) if scheme is None else tag_names(kinds, scheme)
        if not 2 <= len(names) <= _MOST_LABELS:
            raise ValueError(
                f"column {rows.columns.get('label')!r} has {len(names)} different tags: a tagger needs 2 to "
                f"{_MOST_LABELS}. Name another with --label-column."
            )
        return cls(names, "single_label_classification", tokens=True)

    @classmethod
    def of_data(cls, rows: TextDataset, problem_type: str | None = None) -> LabelSet:
        """The labels for a new head, from the data: strings by the alphabet, numbers by size; fractions mean
        regression."""
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

    def metric(self, metric: str | None) -> str:
        """The metric, or the labels' own where it is None: accuracy, for regression Pearson's correlation, and of tags
        the F1 of entities, where they name entities."""
        problem = problem_of(self.problem_type)
        if metric is None:
            return ENTITY_F1 if self.tokens and scheme_of(self.names) else problem.default_metric
        count = len(self.names)
        each = torch.eye(count)[:, None]  # [K, 1, K]: every label is predicted once
        labels = torch.zeros(problem.label_shape(count, count), dtype=torch.long)
        more: dict[str, Any] = {"texts": [0] * count, "label_names": self.names} if self.tokens else {}
        exit_scores(ExitLogits(each, labels, problem_type=self.problem_type, **more), metric)
        return metric

    def encode(self, rows: TextDataset, tokenizer: Any, labeled: bool = True, scored: bool = False) -> Dataset:
        """Token columns, and `labels` where these rows are `labeled`; `scored`: they are not trained on."""
        if self.tokens:
            return encode_tokens(rows, tokenizer, self.names if labeled else None)
        return encode(rows, tokenizer, self.targets(rows, scored) if labeled else None)

    def targets(self, rows: TextDataset, scored: bool = False) -> list[Any] | None:
        """The labels of `rows` as the loss needs them, None in a row without one; None where no row has one."""
        if rows.labels is None:
            return None
        if self.problem_type == "regression":
            return [None if v is None else self._values(v, rows, i) for i, v in enumerate(rows.labels)]
        several = self.problem_type == "multi_label_classification"
        per_row = [[] if v is None else list(v) if isinstance(v, (list, tuple)) else [v] for v in rows.labels]
        if not several and any(len(values) > 1 for values in per_row):
            raise ValueError(f"column {rows.columns.get('label')!r} has several labels in a row, the model gives one.")
        if several and self._are_flags([v for v in per_row if v], rows):
            return [[float(x) for x in v] if v else None for v in per_row]
        numbers = self._numbers({value for values in per_row for value in values}, rows, scored and not several)
        found = [[numbers[value] for value in values] for values in per_row]
        if not several:
            unknown = sum(values == [UNKNOWN_LABEL] for values in found)
            if unknown:
                others = [repr(self._spelled(v, rows)) for v, number in numbers.items() if number == UNKNOWN_LABEL]
                warnings.warn(
                    f"{unknown} of {len(rows)} rows to score have a label that the model does not know "
                    f"({', '.join(sorted(others)[:5])}): every prediction for them counts as an error.",
                    stacklevel=2,
                )
            return [values[0] if values else None for values in found]
        every = range(len(self.names))
        return [
            None if raw is None else [float(i in values) for i in every]
            for raw, values in zip(rows.labels, found, strict=True)
        ]

    def _are_flags(self, per_row: list[list[Any]], rows: TextDataset) -> bool:
        """Whether each row has a 0 or 1 for every label, and not the labels that it has."""
        if not all(len(v) == len(self.names) and set(v) <= {0, 1} for v in per_row):
            return False
        if len(self.names) == 2 and per_row and all(set(v) == {0, 1} and type(v[0]) is int for v in per_row):
            raise ValueError(
                f"column {rows.columns.get('label')!r} can be read in two ways: [0, 1] may be both labels or the "
                f"second alone. Give names ({', '.join(map(repr, self.names))}), or 0.0 and 1.0 for each label."
            )
        return True

    @staticmethod
    def _spelled(value: Any, rows: TextDataset) -> str:
        return rows.class_names[value] if rows.class_names and isinstance(value, int) else str(value)

    def _numbers(self, values: set[Any], rows: TextDataset, scored: bool) -> dict[Any, int]:
        """The number of each raw value: by name or, where none is a name, by place; never a mixture."""
        folded = {name.casefold() for name in self.names}
        # names that differ in case alone have to be spelled as they are
        fold = str.casefold if len(folded) == len(set(self.names)) else str
        known = {fold(name): i for i, name in enumerate(self.names)}
        spelled = {v: self._spelled(v, rows) for v in values}
        found = {v: known[fold(name)] for v, name in spelled.items() if fold(name) in known}
        if len(found) == len(values):
            return found
        places = all(isinstance(value, int) and 0 <= value < len(self.names) for value in values)
        unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in self.names)
        own_names = rows.class_names is not None and not (unnamed and len(rows.class_names) == len(self.names))
        if places and not found and not own_names:
            return {value: int(value) for value in values}
        if scored and found and (own_names or not places):
            return {value: found.get(value, UNKNOWN_LABEL) for value in values}
        wrong = sorted(spelled[value] for value in values - found.keys())
        raise ValueError(
            f"the model does not know the labels {', '.join(map(repr, wrong[:5]))}{', ...' if len(wrong) > 5 else ''} "
            f"of column {rows.columns.get('label')!r}; it knows {', '.join(map(repr, self.names[:20]))}. Rename them "
            f"in the data (the model's names, or numbers from 0 to {len(self.names) - 1} alone), {_LEAVE_OUT}."
        )

    def _values(self, value: Any, rows: TextDataset, i: int) -> Any:
        """The target of row `i`, a number, or a list of one for each output."""
        several = len(self.names) > 1
        try:
            numbers = [float(x) for x in (value if several else [value])]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) == len(self.names) and all(map(math.isfinite, numbers)):
            return numbers if several else numbers[0]
        needed = f"a list of {len(self.names)} finite numbers" if several else "a finite number"
        raise ValueError(
            f"column {rows.columns.get('label')!r} holds {value!r} in row {rows.number(i)}, but the model does "
            f"regression and needs {needed}. Fix or leave out the row, name another column with --label-column, "
            f"{_LEAVE_OUT}."
        )
