"""`ExitLogits`: the logits of all exits on a data set, from which every policy is replayed.

`collect_exit_logits` makes them, in one full-depth pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from badge_peft.early_exit.cached_states import CachedStates, texts_of
from badge_peft.early_exit.groups import group_codes
from badge_peft.early_exit.history import ExitHistory
from badge_peft.evaluation.collate import labeled_features, labeled_tokens, pad_features, tensor_columns
from badge_peft.model import get_badge_model
from badge_peft.utils import distributed
from badge_peft.utils.files import replacing
from badge_peft.utils.problem import NO_LABEL, infer_problem_type, problem_of

_NUMBER = "number"  # of a row
_UNCERTAINTY = "signals"  # its name in the file, which files of earlier versions have
_LONGEST = 2**20  # tokens of a text, which number them


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
    _history: ExitHistory | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.logits.dim() != 3 or not self.logits.numel():
            raise ValueError(f"logits must be [N, E, K] with at least one row, got shape {list(self.logits.shape)}.")
        n, e, k = self.logits.shape
        self.logits = self.logits.detach().float().cpu()
        self.uncertainty = None if self.uncertainty is None else self.uncertainty.detach().float().cpu()
        self.exit_layers = list(self.exit_layers) if self.exit_layers is not None else list(range(1, e + 1))
        if len(self.exit_layers) != e or sorted(set(self.exit_layers)) != self.exit_layers:
            raise ValueError(f"exit_layers={self.exit_layers} must be {e} increasing block numbers.")
        if self.uncertainty is not None and tuple(self.uncertainty.shape) != (n, e):
            raise ValueError(f"uncertainty must be [{n}, {e}], got {list(self.uncertainty.shape)}.")
        self._check_finite()
        if self.problem_type is None:
            self.problem_type = infer_problem_type(k)
        if self.labels is not None:
            if len(self.labels) != n:
                raise ValueError(f"there are {len(self.labels)} labels for {n} rows of logits.")
            self.labels = problem_of(self.problem_type).scored_labels(self.labels.detach().cpu(), k, n)
        codes = group_codes(self.groups, n)
        self.groups = None if codes is None else torch.from_numpy(codes)
        if self.num_blocks is None:
            self.num_blocks = self.exit_layers[-1]

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

    def select(self, rows: Tensor) -> ExitLogits:
        """The rows that an index or boolean tensor picks."""
        parts = (self.labels, self.uncertainty, self.groups)
        labels, uncertainty, groups = (None if x is None else x[rows] for x in parts)
        return replace(self, logits=self.logits[rows], labels=labels, uncertainty=uncertainty, groups=groups)

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

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        tensors = {"logits": self.logits, "labels": self.labels, _UNCERTAINTY: self.uncertainty, "groups": self.groups}
        names = ("exit_layers", "problem_type", "num_blocks", "weights_hash", "deployed")
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
        with safe_open(str(path), framework="pt") as file:
            meta = (file.metadata() or {}).get("exit_logits")
            names = set(file.keys())
            if meta is None or "logits" not in names:
                raise ValueError(f"{path} holds no exit logits: write it with ExitLogits.save.")
            tensors = {name: file.get_tensor(name) for name in names & {"logits", "labels", "groups", _UNCERTAINTY}}
        return cls(uncertainty=tensors.pop(_UNCERTAINTY, None), **tensors, **json.loads(meta))


@torch.no_grad()
def collect_exit_logits(
    model: nn.Module,
    dataset: Any,
    batch_size: int = 32,
    data_collator: Callable[[list[Any]], Any] | None = None,
    progress: bool = False,
    split_between_processes: bool = False,
    cached_states: CachedStates | None = None,
) -> ExitLogits:
    """Runs every row through all blocks once and keeps the logits of every exit.

    Rows are batched by length, so that little is padded; the result is in the order of the data set. Where some rows
    have a label, those without one (none, or -100) are left out, with a warning that counts them. Of token
    classification the rows of the result are tokens, text by text: those with a label, or where none has any all that
    are no padding.

    Args:
        model: A PEFT model with an active BADGE adapter. Its training mode is restored afterwards.
        dataset: Rows of features (`input_ids`, `attention_mask`, ..., `label` or `labels`): a `datasets.Dataset` or
            any sequence of dicts. Columns that the model does not read (text, say) are left out.
        batch_size: Rows per pass.
        data_collator: Makes a batch of rows; None pads with the model's `pad_token_id`.
        progress: Show a progress bar, in the main process.
        split_between_processes: Under `accelerate launch` or `torchrun`, run a part of the batches in each process and
            give all of them to each; every process has to make the call, with the same data. False: each call runs all
            rows by itself.
        cached_states: Of these rows, by `cache_states`: no block runs then.

    Raises:
        ValueError: the data set is empty, `cached_states` are those of other texts, or what `ExitLogits` refuses.
    """
    badge = get_badge_model(model)
    if not len(dataset):
        raise ValueError("the data set is empty: there is nothing to collect.")
    config = badge.config_of()
    problem = problem_of(config.resolved_problem_type)
    rows = [{**row, _NUMBER: i} for i, row in enumerate(tensor_columns(badge.model, dataset))]
    if cached_states is not None and cached_states.texts != texts_of(rows):
        raise ValueError("cached_states are those of other texts: make them with cache_states(model, dataset).")
    tokens = config.reads_tokens
    check = labeled_tokens if tokens else labeled_features
    rows = check(rows, config.resolved_labels, problem)
    places = torch.tensor([row.pop(_NUMBER) for row in rows])  # among all rows, of which those with a label are left
    collate = data_collator or (lambda batch: pad_features(batch, badge.model, tokens))
    device = next(badge.model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, size = distributed.rank_world() if split_between_processes else (0, 1)
    found = []  # of each batch the numbers of its rows, and logits, labels and uncertainty
    was_training = model.training
    model.eval()
    try:
        for numbers in tqdm(batches[rank::size], desc="exit logits", disable=not (progress and distributed.is_main())):
            batch = {name: value.to(device) for name, value in collate([rows[i] for i in numbers]).items()}
            labels = batch.pop("labels", None)
            if cached_states is not None:
                batch |= {"cached_states": cached_states, "cached_rows": places[numbers].to(device)}
            output = badge(**batch)
            kept = (output.exit_logits.float(), labels, output.exit_uncertainty)
            if tokens:
                real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                kept, numbers = _by_token(kept, real, numbers)
            found.append((numbers, *(None if x is None else x.cpu() for x in kept)))
    finally:
        model.train(was_training)
    if size > 1:
        found = distributed.gather(found)
    numbers, *parts = zip(*found, strict=True)
    back = torch.tensor(list(chain.from_iterable(numbers))).argsort()
    labels, uncertainty = (None if part[0] is None else torch.cat(part)[back] for part in parts[1:])
    logits = torch.cat(parts[0])[back]
    deployed = config.final_exit == "base_head" and not config.train_head and config.backbone == "frozen"
    return ExitLogits(
        logits,
        labels,
        badge.exit_layers(),
        problem.name,
        badge.num_blocks,
        uncertainty,
        badge.weights_hash(),
        deployed,
    )


def _by_token(
    kept: tuple[Tensor, Tensor | None, Tensor | None], mask: Tensor, numbers: list[int]
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], list[int]]:
    """Logits [B, E, S, K], labels [B, S] and uncertainty [B, E, S] of a batch with tokens as rows, and a number for
    each, by which they are in the order of the texts and of their tokens."""
    logits, labels, uncertainty = kept
    counts = mask != 0 if labels is None else (labels != NO_LABEL) & (mask != 0)
    row, position = counts.nonzero(as_tuple=True)
    tokens = [numbers[i] * _LONGEST + j for i, j in zip(row.tolist(), position.tolist(), strict=True)]
    doubts = None if uncertainty is None else uncertainty.transpose(1, 2)[counts]
    return (logits.transpose(1, 2)[counts], None if labels is None else labels[counts], doubts), tokens
