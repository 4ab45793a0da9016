"""What is told of an exported file: the report, how its answers differ from the PyTorch model's, and its README.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import policy_class
from badge_peft.evaluation.collate import SPECIAL, labeled_rows, pad_features
from badge_peft.evaluation.metrics import METRICS
from badge_peft.export.pieces import ALONE
from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxOutput
from badge_peft.model import BadgeModel
from badge_peft.utils.problem import NO_LABEL, problem_of

_TEMPLATE = Path(__file__).parent / "card_template.md"


@dataclass
class ParityReport:
    """A file against its PyTorch model on the same rows.

    Args:
        rows: How many.
        same_answer: Share of rows, or of tokens that count, with the same predicted label (regression: mean absolute
            difference of the values).
        same_exit: Share of rows that stop at the same block.
        mean_exit: Mean number of the block that answered, in the file.
        mean_exit_before: In PyTorch.
        score: Accuracy (regression: Pearson correlation) of the file, where there are labels.
        score_before: Of PyTorch.
    """

    rows: int
    same_answer: float
    same_exit: float
    mean_exit: float
    mean_exit_before: float
    score: float | None = None
    score_before: float | None = None


@dataclass
class OnnxExportReport:
    """What `export_onnx` wrote.

    Args:
        directory: Where.
        size_bytes: Of `model.onnx`.
        int8: Whether the blocks are quantized.
        policy: The exit policy that is in the file.
        threshold: Its default for the input `threshold`; a list where each exit has its own.
        patience: Its default for the input `patience`.
        exit_layers: Block numbers at which rows can answer.
        max_difference: Largest difference of logits from PyTorch's on random rows (float32 files).
        changes: What differs from the PyTorch model on `examples`, where there were any.
    """

    directory: str
    size_bytes: int
    int8: bool
    policy: str
    threshold: float | list[float]
    patience: int
    exit_layers: list[int]
    max_difference: float | None = None
    changes: ParityReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


def compare(badge: BadgeModel, session: OnnxEarlyExitModel, config: EarlyExitConfig, examples: Any) -> ParityReport:
    """Both models on `examples`, tokenized rows with or without labels, one by one; where the policy ranks, query by
    query: rows with the same `groups`, all without that column."""
    if not len(examples):
        raise ValueError("there are no examples: pass at least one tokenized row, or None.")
    problem = problem_of(session.config["problem_type"])
    tokens = session.reads_tokens
    rows = labeled_rows(badge.model, examples, session.config["num_labels"], problem, tokens)
    batches = [[i] for i in range(len(rows))]
    if policy_class(config).by_group:
        groups = examples["groups"][:] if "groups" in getattr(examples, "column_names", ()) else [0] * len(rows)
        members: dict[Any, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        batches = [*members.values()]
        rows = [rows[i] for batch in batches for i in batch]
    counts: list[Any] = [_counted(row) if tokens else slice(None) for row in rows[: len(batches)]]
    labels = [torch.as_tensor(row.pop("labels")) for row in rows if "labels" in row]
    waiting = iter(rows)
    pairs = [
        _both(badge, session, {ALONE: config}, pad_features(list(islice(waiting, len(batch))), badge.model))[0]
        for batch in batches
    ]
    (logits_before, exits_before), (logits, exits) = (
        (
            np.concatenate([(x.logits[0] if tokens else x.logits)[k] for x, k in zip(outputs, counts, strict=True)]),
            np.concatenate([x.exit_layer.max(keepdims=True) if tokens else x.exit_layer for x in outputs]),
        )
        for outputs in zip(*pairs, strict=True)
    )
    before, after = torch.from_numpy(logits_before), torch.from_numpy(logits)
    old, new = problem.predictions(before), problem.predictions(after)
    same = problem.same(before, after)
    changes = ParityReport(
        rows=len(rows),
        same_answer=float(np.abs(old - new).mean()) if same is None else same,
        same_exit=float((exits == exits_before).mean()),
        mean_exit=float(exits.mean()),
        mean_exit_before=float(exits_before.mean()),
    )
    if labels:
        of_tokens = zip(labels, counts, strict=True)
        given = torch.cat([label[k] for label, k in of_tokens]) if tokens else torch.stack(labels)
        truth = problem.scored_labels(given, session.config["num_labels"], len(before)).numpy()
        metric = METRICS[problem.default_metric]
        changes.score, changes.score_before = (metric(x, truth) for x in (new, old))
    return changes


def _counted(row: dict[str, Any]) -> np.ndarray:
    """[S] bool: the tokens that are compared: those with a label, else those that need an answer."""
    if "labels" in row:
        return np.asarray(row["labels"]) != NO_LABEL
    return np.asarray(row.get(SPECIAL, [0] * len(row["input_ids"]))) == 0


def largest_difference(
    badge: BadgeModel, session: Any, configs: dict[str, EarlyExitConfig], inputs: dict[str, Tensor]
) -> float:
    """Of the logits on `inputs` [B, S], its rows together and the first one alone, for each task; what stops elsewhere
    (ties) is left out. NaN where nothing stops at the same block."""
    differences = [
        np.abs(expected.logits - found.logits)[expected.exit_layer == found.exit_layer].ravel()
        for batch in (inputs, {name: value[:1] for name, value in inputs.items()})
        for expected, found in _both(badge, session, configs, batch)
    ]
    values = np.concatenate(differences)
    return float(values.max()) if values.size else float("nan")


def onnx_card(report: OnnxExportReport, metadata: dict[str, Any], has_tokenizer: bool) -> str:
    """The README.md beside the graph, given the content of `early_exit.json`."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    tau = metadata["threshold"]
    return template.render(
        **metadata,
        tokens=SPECIAL in metadata["inputs"],
        tau=f"[{', '.join(f'{x:g}' for x in tau)}]" if isinstance(tau, list) else f"{tau:g}",
        report=report,
        changes=report.changes,
        has_tokenizer=has_tokenizer,
    )


def _both(
    badge: BadgeModel, session: Any, configs: dict[str, EarlyExitConfig], batch: dict[str, Tensor]
) -> list[tuple[OnnxOutput, OnnxOutput]]:
    """PyTorch's output and the file's, for each task."""
    found = session(**{name: batch[name].numpy() for name in session.config["inputs"] if name in batch})
    if session.has_tasks:
        expected: Any = early_exit_forward(badge, tasks=list(configs), early_exit_config=configs, **batch)
    else:
        expected = {ALONE: early_exit_forward(badge, early_exit_config=configs[ALONE], **batch)}
        found = {ALONE: found}
    pairs = []
    for task, own in expected.items():
        exits = own.exit_layer if own.token_exit_layer is None else own.token_exit_layer
        pairs.append((OnnxOutput(own.logits.numpy(), exits.numpy()), found[task]))
    return pairs
