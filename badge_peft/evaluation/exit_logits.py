"""`ExitLogits`: the logits of all exits on a data set, from which every policy is replayed, and what leaves as one.

`collect_exit_logits` (`collect.py`) makes them, in one full-depth pass.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from badge_peft.early_exit.history import ExitHistory, group_codes
from badge_peft.utils.checks import check_int
from badge_peft.utils.files import replacing
from badge_peft.utils.problem import infer_problem_type, problem_of

_UNCERTAINTY = "signals"  # its name in the file, which files of earlier versions have
_TENSORS = {"logits", "labels", "groups", "texts", _UNCERTAINTY}


class Units:
    """The U units of N rows: what leaves a batch as one, and is drawn and counted as one. A row or, where rows are
    tokens, a text: `texts` [N] has a number for each row, the same for all of a text, which lie side by side."""

    def __init__(self, rows: int, texts: np.ndarray | None = None) -> None:
        self.rows = rows
        #: [N] bool: the rows with which a unit begins.
        self.first = np.ones(rows, dtype=bool) if texts is None else np.append(True, texts[1:] != texts[:-1])
        self._are_rows = bool(self.first.all())

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def starts(self) -> np.ndarray:
        """[U]: the first row of each."""
        return np.flatnonzero(self.first)

    @cached_property
    def sizes(self) -> np.ndarray:
        """[U]: how many rows each has."""
        return np.diff(np.append(self.starts, self.rows))

    def largest(self, values: np.ndarray) -> np.ndarray:
        """[..., N] -> [..., U]: the largest value of each; of blocks, where the unit leaves."""
        return values if self._are_rows else np.maximum.reduceat(values, self.starts, axis=-1)

    def total(self, values: np.ndarray) -> np.ndarray:
        """[..., N] -> [..., U]: the sum in each."""
        return values if self._are_rows else np.add.reduceat(values, self.starts, axis=-1)

    def rows_of(self, units: np.ndarray) -> np.ndarray:
        """[u] -> [n]: the rows of these units, in their order."""
        if self._are_rows:
            return units
        sizes = self.sizes[units]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(self.starts[units], sizes) + within


@dataclass
class ExitLogits:
    """What every exit said about every row.

    Args:
        logits: [N, E, K], float32, shallow to deep.
        labels: [N] class numbers, or [N, K] targets; None when the data has none. `UNKNOWN_LABEL` of
            `badge_peft.utils.problem` is a class that the model lacks, which no answer has.
        exit_layers: Block numbers of the E exits; the last is M. None means 1 to E.
        problem_type: As transformers has it; None means regression for K = 1, else single-label classification.
        num_blocks: M, which turns blocks into a speed-up. None means the last exit's block.
        uncertainty: [N, E], what the `learned` policy reads, when the adapter has it.
        weights_hash: Of the adapter that gave them (`BadgeModel.weights_hash`); None where it is not known.
        deployed: Whether the last exit is the head of a model that was there before the exits, as it was: what these
            lose is then counted from it, and else from the best exit.
        groups: [N], an id for each row, the same for the candidates of a query; kept as whole numbers. None: no query.
        texts: [N], of token classification, where each row is a token: a number for each, the same for all tokens of a
            text, which lie side by side. A text stops with its last token, and blocks are those of texts. None: each
            row stops by itself.
        label_names: K, of token classification the tags by which entities are scored.

    Raises:
        ValueError: shapes that do not belong together, a row whose logits are not finite, or one without a label or
            with one that is not allowed.
    """

    logits: Tensor
    labels: Tensor | None = None
    exit_layers: list[int] | None = None
    problem_type: str | None = None
    num_blocks: int | None = None
    uncertainty: Tensor | None = None
    weights_hash: str | None = None
    deployed: bool = False
    groups: Any = None
    texts: Any = None
    label_names: list[str] | None = None
    _history: ExitHistory | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.logits.dim() != 3 or not self.logits.numel():
            raise ValueError(f"logits must be [N, E, K] with at least one row, got shape {list(self.logits.shape)}.")
        n, e, k = self.logits.shape
        self.logits = self.logits.detach().float().cpu()
        self.uncertainty = None if self.uncertainty is None else self.uncertainty.detach().float().cpu()
        self.exit_layers = [int(m) for m in (range(1, e + 1) if self.exit_layers is None else self.exit_layers)]
        if len(self.exit_layers) != e or sorted(set(self.exit_layers)) != self.exit_layers:
            raise ValueError(f"exit_layers={self.exit_layers} must be {e} increasing block numbers.")
        if self.uncertainty is not None and tuple(self.uncertainty.shape) != (n, e):
            raise ValueError(f"uncertainty must be [{n}, {e}], got {list(self.uncertainty.shape)}.")
        self._check_finite()
        if self.problem_type is None:
            self.problem_type = infer_problem_type(k)
        problem = problem_of(self.problem_type)
        if self.labels is not None:
            if len(self.labels) != n:
                raise ValueError(f"there are {len(self.labels)} labels for {n} rows of logits.")
            self.labels = problem.scored_labels(self.labels.detach().cpu(), k, n)
        codes = group_codes(self.groups, n)
        self.groups = None if codes is None else torch.from_numpy(codes)
        if self.texts is not None:
            self.texts = torch.as_tensor(self.texts)
            if self.texts.shape != (n,):
                raise ValueError(f"texts has shape {list(self.texts.shape)} for {n} tokens: it needs one for each.")
            if len(self.texts.unique()) != len(self.units):
                raise ValueError("texts has one number in several places: tokens of a text must lie side by side.")
        if self.label_names is not None and len(self.label_names) != k:
            raise ValueError(f"label_names has {len(self.label_names)} names for {k} labels.")
        self.num_blocks = self.exit_layers[-1] if self.num_blocks is None else int(self.num_blocks)
        check_int("num_blocks", self.num_blocks, at_least=max(1, self.exit_layers[-1]))

    def _check_finite(self) -> None:
        """The largest of NaN is the first label: such rows would make exits that look alike, and agree with full
        depth."""
        for name, values in (("logits", self.logits), ("uncertainty", self.uncertainty)):
            if values is not None and not values.isfinite().all():
                row, j = (int(x) for x in (~values.isfinite()).nonzero()[0][:2])
                raise ValueError(
                    f"the {name} of row {row} at the exit after block {self.exits[j]} are not finite, so nothing can "
                    "be chosen by them: train again with a smaller learning rate or in float32, or leave out the row."
                )

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def exits(self) -> list[int]:
        """Block numbers of the exits."""
        assert self.exit_layers is not None
        return self.exit_layers

    @property
    def kind(self) -> str:
        """The problem type."""
        assert self.problem_type is not None
        return self.problem_type

    @property
    def depth(self) -> int:
        """M."""
        assert self.num_blocks is not None
        return self.num_blocks

    @cached_property
    def units(self) -> Units:
        """What leaves a batch as one: the rows or, of token classification, the texts."""
        return Units(len(self), None if self.texts is None else self.texts.numpy())

    @cached_property
    def predictions(self) -> np.ndarray:
        """[E, N]: what each exit predicts of each row; several labels or values of a row are [E, N, K]."""
        problem = problem_of(self.kind)
        return np.stack([problem.predictions(self.logits[:, j]) for j in range(len(self.exits))])

    @cached_property
    def targets(self) -> np.ndarray:
        """[N], or [N, K] of several labels or values: the labels, as `predictions` has them.

        Raises:
            ValueError: there are none.
        """
        if self.labels is None:
            raise ValueError(
                "the exit logits have no labels, so there is nothing to score against: exit_logits.labeled() takes "
                "full depth's own predictions as labels."
            )
        return problem_of(self.kind).targets(self.labels)

    def select(self, rows: Tensor) -> ExitLogits:
        """The rows that an index or boolean tensor picks, with what their policies have derived."""
        names = ("labels", "uncertainty", "groups", "texts")
        picked: Any = {name: x[rows] for name in names if (x := getattr(self, name)) is not None}
        part = replace(self, logits=self.logits[rows], **picked)
        if self._history is not None:
            groups = None if part.groups is None else part.groups.numpy()
            part._history = self._history.of_rows(rows.numpy()).in_groups(groups)
        return part

    def labeled(self) -> ExitLogits:
        """These rows; without labels, with full depth's own predictions as labels, so that a score is the agreement
        with full depth."""
        if self.labels is not None:
            return self
        return replace(self, labels=torch.from_numpy(problem_of(self.kind).predictions(self.logits[:, -1])))

    def history(self) -> ExitHistory:
        """The rows as a policy sees them; made once, so that many replays share what they derive."""
        if self._history is None:
            uncertainty = None if self.uncertainty is None else self.uncertainty.numpy()
            groups = None if self.groups is None else self.groups.numpy()
            self._history = ExitHistory.of(self.logits.numpy(), self.exits, self.kind, uncertainty, groups)
        return self._history

    def answers(self, exit_layer: Tensor) -> Tensor:
        """[N, K]: the logits of each row at the block where it stopped (`exit_layer` [N], block numbers)."""
        index = torch.searchsorted(torch.tensor(self.exits), exit_layer.cpu())
        return self.logits[torch.arange(len(self)), index]

    def predicted(self, exit_layer: np.ndarray) -> np.ndarray:
        """[N]: the prediction of each row at the block where it stopped (`exit_layer` [N], block numbers)."""
        return self.predictions[np.searchsorted(self.exits, exit_layer), np.arange(len(self))]

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in _TENSORS - {_UNCERTAINTY}} | {_UNCERTAINTY: self.uncertainty}
        names = ("exit_layers", "problem_type", "num_blocks", "weights_hash", "deployed", "label_names")
        meta = {name: getattr(self, name) for name in names}
        with replacing(path) as temporary:
            save_file(
                {k: v.contiguous() for k, v in tensors.items() if v is not None},
                temporary,
                metadata={"exit_logits": json.dumps(meta)},
            )

    @classmethod
    def load(cls, path: str | Path) -> ExitLogits:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = (file.metadata() or {}).get("exit_logits")
                tensors = {name: file.get_tensor(name) for name in _TENSORS.intersection(file.keys())}
        except SafetensorError as error:
            raise ValueError(f"{path} holds no exit logits: {error}.") from error
        if meta is None or "logits" not in tensors:
            raise ValueError(f"{path} holds no exit logits: write it with ExitLogits.save.")
        return cls(uncertainty=tensors.pop(_UNCERTAINTY, None), **tensors, **json.loads(meta))
