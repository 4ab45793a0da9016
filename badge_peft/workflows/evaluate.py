"""`evaluate_adapter`: exits, policy and clock on a data set. What `badge-peft evaluate` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits, collect_exit_logits
from badge_peft.evaluation.latency import measure_latency
from badge_peft.evaluation.metrics import METRICS, exit_scores
from badge_peft.evaluation.tradeoff import evaluate_policy
from badge_peft.model import get_badge_model
from badge_peft.utils import distributed
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.adapter_dir import Adapter, open_adapter, stored_logits
from badge_peft.workflows.data import TextDataset, read_examples
from badge_peft.workflows.encode import encode
from badge_peft.workflows.settings import Columns


def evaluate_adapter(
    adapter: Adapter,
    examples: TextDataset,
    metric: str | None = None,
    batch_size: int = 32,
    latency: int = 0,
    progress: bool = True,
) -> tuple[dict[str, Any], ExitLogits]:
    """Scores every exit and the adapter's own policy.

    Several processes (`accelerate launch`, `torchrun`) share the rows; each has to make the call, and has the result.

    Args:
        adapter: From `open_adapter`.
        examples: From `read_examples`, with `recorded=adapter.columns`; without labels, scores are the
            agreement with full depth.
        metric: None is accuracy, for regression Pearson.
        batch_size: Rows per pass.
        latency: How many rows to time, one by one, in the first process; 0 for none.
        progress: Show progress bars.

    Returns:
        The report, and the exit logits that it was made from.
    """
    distributed.init_process_group()
    check_metric(metric, adapter.labels.problem_type, len(adapter.labels.names))
    encoded = encode_for(adapter, examples)
    exit_logits = collect_exit_logits(
        adapter.model, encoded, batch_size, progress=progress, split_between_processes=True
    )
    report = measure(exit_logits, get_badge_model(adapter.model).get_early_exit_config(), metric)
    report["split"] = examples.split
    if latency and distributed.is_main():
        report["latency"] = time_rows(adapter.model, encoded, latency, progress)
    return report, exit_logits


def time_rows(model: PeftModel, rows: Dataset, count: int, progress: bool = True) -> dict[str, Any]:
    """What `measure_latency` has of the first `count` rows, without the numbers of each row."""
    timed = rows.select(range(min(count, len(rows))))
    measured = measure_latency(model, timed, progress=progress).to_dict()
    return {k: v for k, v in measured.items() if not isinstance(v, (list, dict))} | {"rows": len(timed)}


def encode_for(adapter: Adapter, examples: TextDataset) -> Dataset:
    """Encoded rows with the adapter's targets."""
    return encode(examples, adapter.tokenizer, adapter.labels.targets(examples))


def logits_of(
    path: str,
    data: str | None,
    columns: Columns,
    base_model: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> ExitLogits:
    """The exit logits to replay: of `data` run through the adapter at `path`, else those stored there.

    Raises:
        OSError: something is not there.
        ValueError: something is not what it should be.
    """
    if data is None:
        return stored_logits(path)
    if Path(path).is_file():
        raise ValueError(f"{path} holds exit logits, so no data is needed: leave {data} out, or give an adapter.")
    adapter = open_adapter(path, base_model, device)
    examples = read_examples(data, columns, recorded=adapter.columns)
    return collect_exit_logits(adapter.model, encode_for(adapter, examples), batch_size, progress=True)


def default_metric(problem_type: str | None) -> str:
    """Accuracy; for regression Pearson's correlation."""
    return problem_of(problem_type or "single_label_classification").default_metric


def measure(exit_logits: ExitLogits, config: EarlyExitConfig, metric: str | None = None) -> dict[str, Any]:
    """Scores per exit, and what `config` costs and saves, by replay.

    Args:
        exit_logits: Without labels every score is the agreement with full depth.
        config: How the adapter stops.
        metric: As for `exit_scores`; None is accuracy, for regression Pearson.
    """
    metric = metric or default_metric(exit_logits.problem_type)
    scored = exit_logits.labeled()
    scores = exit_scores(scored, metric)
    point = evaluate_policy(scored, config, metric)
    stops = build_policy(config).replay(exit_logits)
    numbers, counts = np.unique(stops.numpy(), return_counts=True)
    stopped = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return {
        "rows": len(exit_logits),
        "labels": "given" if exit_logits.labels is not None else "full depth's own answers",
        "metric": metric,
        "num_blocks": exit_logits.depth,
        "exit_layers": scores.exit_layers,
        "per_exit": scores.per_exit,
        "s_avg": scores.avg,
        "s_best": scores.best,
        "full_depth_score": scores.per_exit[-1],
        "early_exit": {
            "config": {k: v for k, v in config.to_dict().items() if k not in ("calibration", "parameters")},
            "score": point.score,
            "mean_exit": point.mean_exit,
            "layer_speedup": point.layer_speedup,
            "answers_as_full_depth": agreement(
                exit_logits.answers(stops), exit_logits.logits[:, -1], exit_logits.problem_type
            ),
            "rows_stopped": [stopped.get(m, 0) for m in scores.exit_layers],
        },
    }


def check_metric(metric: str | None, problem_type: str, num_labels: int) -> None:
    """Refuses a metric that does not suit, before any time is spent.

    Raises:
        ValueError: it does not.
    """
    if metric is None:
        return
    if metric in ("f1", "acc_and_f1") and problem_type == "single_label_classification" and num_labels > 2:
        raise ValueError(
            f"metric={metric!r} is for two classes, and there are {num_labels}: use 'macro_f1', or one of "
            f"{', '.join(METRICS)} that suits."
        )
    two = torch.zeros(2, 1, num_labels)
    labels = torch.zeros(problem_of(problem_type).label_shape(2, num_labels))
    exit_scores(ExitLogits(two, labels, problem_type=problem_type), metric)


def agreement(answers: torch.Tensor, full_depth: torch.Tensor, problem_type: str | None) -> float | None:
    """Fraction of rows whose prediction is full depth's; None for regression.

    Args:
        answers: [N, K], logits.
        full_depth: [N, K], logits.
        problem_type: As transformers has it.
    """
    return problem_of(problem_type or "single_label_classification").same(answers, full_depth)
