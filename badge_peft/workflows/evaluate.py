"""`evaluate_adapter`: exits, policy and clock on a data set. What `badge-peft evaluate` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation import ExitLogits, collect_exit_logits
from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.evaluation.curve import ExitPromise
from badge_peft.evaluation.entities import scheme_of
from badge_peft.evaluation.latency import measure_latency
from badge_peft.evaluation.metrics import ENTITY_F1, exit_scores, score
from badge_peft.evaluation.tradeoff import evaluate_policy
from badge_peft.hub import LOGITS
from badge_peft.model import get_badge_model
from badge_peft.utils import distributed
from badge_peft.utils.logs import quiet
from badge_peft.utils.problem import UNKNOWN_LABEL, problem_of
from badge_peft.workflows.adapter_dir import Adapter, TaskStack, check_adapter, open_adapter, read_config
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.predict import batch_of, pairs_of
from badge_peft.workflows.rankings import check_metric, measure_ranking, with_queries
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.sources import read_source

COMPARED = 512  # rows that are compared with the checkpoint, at most


def evaluate_adapter(
    adapter: Adapter, examples: TextDataset, metric: str | None = None, batch_size: int = 32, latency: int = 0
) -> tuple[dict[str, Any], ExitLogits]:
    """Scores every exit and the adapter's own policy: the report, and the exit logits that it was made from.

    Several processes share the rows; each has to make the call, and has the result.

    Args:
        adapter: From `open_adapter`.
        examples: From `Adapter.read`; without labels, scores are the agreement with full depth.
        metric: None is accuracy, for regression Pearson, for tags the F1 of entities.
        batch_size: Rows per pass.
        latency: How many rows to time, one by one, in the first process; 0 for none.
    """
    ranks = adapter.task == "ranking"
    if ranks:
        check_metric(metric)
        if latency:
            raise ValueError(
                f"latency={latency} times rows one by one, and candidates of a query are ranked together: leave it "
                "out, and time queries with `badge-peft bench`."
            )
    metric = resolve_metric(metric, adapter.labels.problem_type, len(adapter.labels.names), adapter.tags)
    encoded = adapter.encode(examples)
    exit_logits = collect_exit_logits(
        adapter.model,
        encoded,
        batch_size,
        progress=True,
        split_between_processes=True,
    )
    if ranks:
        exit_logits = with_queries(exit_logits, examples)
    report = {**measure(exit_logits, adapter.badge.get_early_exit_config(), metric), "split": examples.split}
    if latency and distributed.is_main():
        report["latency"] = time_rows(adapter.model, encoded, latency)
    return report, exit_logits


def time_rows(model: PeftModel, rows: Dataset, count: int) -> dict[str, Any]:
    """What `measure_latency` has of the first `count` rows, without the numbers of each row."""
    timed = rows.select(range(min(count, len(rows))))
    measured = measure_latency(model, timed, progress=True).to_dict()
    return {k: v for k, v in measured.items() if not isinstance(v, (list, dict))} | {"rows": len(timed)}


def logits_of(
    path: str,
    data: str | None,
    columns: Columns = Columns(),
    base_model: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> ExitLogits:
    """The exit logits to replay: of `data` run through the adapter at `path`, else those stored there."""
    if data is None:
        given = [name for name, value in vars(columns).items() if value != getattr(Columns(), name)]
        if given:
            raise ValueError(
                f"{given[0]}={getattr(columns, given[0])!r} says what is read of data, and none is named: name it, or "
                f"leave {given[0]} out to take the exit logits that are stored."
            )
        return stored_logits(path)
    if Path(path).is_file():
        raise ValueError(f"{path} holds exit logits, so no data is needed: leave {data} out, or give an adapter.")
    adapter = open_adapter(path, base_model, device)
    examples = adapter.read(data, columns)
    found = collect_exit_logits(adapter.model, adapter.encode(examples), batch_size, progress=True)
    return with_queries(found, examples) if adapter.task == "ranking" else found


def stored_logits(path: str | Path) -> ExitLogits:
    """The exit logits in a file, or those that `badge-peft train` left in an adapter's folder."""
    file = Path(path)
    if file.is_dir():
        check_adapter(path)
        file = file / LOGITS
        if not file.exists():
            raise FileNotFoundError(
                f"{path} has no {LOGITS}: give the data to run through the adapter, or write the file with "
                "`badge-peft evaluate --save-logits`."
            )
    elif not file.exists():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    found = ExitLogits.load(file)
    if Path(path).is_dir():
        check_fit(path, found)
    return found


def check_fit(folder: str | Path, exit_logits: ExitLogits) -> None:
    """Refuses stored logits that are not of this adapter."""
    config = read_config(folder)
    blocks, labels, exits = (config.get(name) for name in ("num_blocks", "num_labels", "exit_layers"))
    depth = exit_logits.depth
    outputs = exit_logits.logits.shape[-1]
    wanted = sorted({*(exits or range(1, depth + 1)), depth})
    remedy = f"give the data to run through the adapter, or store them anew: badge-peft evaluate {folder} DATA "
    remedy += f"--save-logits {Path(folder) / LOGITS}"
    if blocks not in (None, depth) or labels not in (None, outputs):
        raise ValueError(
            f"the exit logits are of a model with {depth} blocks and {outputs} outputs, but the adapter in "
            f"{folder} has {blocks} and {labels}: {remedy}"
        )
    if exit_logits.exits != wanted:
        raise ValueError(
            f"the exit logits are of exits {exit_logits.exits}, but the adapter in {folder} has {wanted}: {remedy}"
        )
    hashes = {exit_logits.weights_hash, config.get("weights_hash")}
    if len(hashes - {None}) > 1:
        raise ValueError(f"the exit logits are of other weights than the adapter in {folder} has now: {remedy}")


def measure(exit_logits: ExitLogits, config: EarlyExitConfig, metric: str = "accuracy") -> dict[str, Any]:
    """Scores per exit, and what `config` costs and saves, by replay; without labels every score is the agreement with
    full depth, and of rows with queries it is that of their top k. Of tokens, rows are texts."""
    if exit_logits.groups is not None:
        ranked = measure_ranking(exit_logits, config)
        return {**ranked, "early_exit": {"config": recorded_fields(config), **ranked["early_exit"]}}
    scored = exit_logits.labeled()
    scores = exit_scores(scored, metric)
    point = evaluate_policy(scored, config, metric)
    promise = ExitPromise.of(exit_logits, config)
    unknown = 0
    if exit_logits.labels is not None and problem_of(exit_logits.kind).gives_labels:
        unknown = int(torch.eq(exit_logits.labels, UNKNOWN_LABEL).sum())
    return {
        "rows": len(exit_logits.units),
        **({} if exit_logits.texts is None else {"tokens": len(exit_logits)}),
        "weights_hash": exit_logits.weights_hash,
        "rows_of_unknown_label": unknown,
        "labels": "given" if exit_logits.labels is not None else "full depth's own answers",
        "metric": metric,
        "num_blocks": exit_logits.depth,
        "exit_layers": scores.exit_layers,
        "per_exit": scores.per_exit,
        "s_avg": scores.avg,
        "s_best": scores.best,
        "full_depth_score": scores.per_exit[-1],
        "early_exit": {
            "config": recorded_fields(config),
            "score": point.score,
            "mean_exit": point.mean_exit,
            "layer_speedup": point.layer_speedup,
            "answers_as_full_depth": promise.agreement,
            "rows_stopped": list(promise.rows_stopped),
        },
    }


def constant_answer(exit_logits: ExitLogits, metric: str | None, names: Sequence[str]) -> dict[str, Any]:
    """The `answer` that is right most often, of values the mean, what it would `score` as that of every row, and
    whether it is `beaten` by an exit."""
    problem = problem_of(exit_logits.kind)
    labels = exit_logits.labels
    if labels is None:
        raise ValueError("the exit logits have no labels, so no answer is right.")
    metric = metric or problem.default_metric
    if problem.gives_labels:
        known, counts = labels.unique(dim=0, return_counts=True)
        common = known[(counts * (known != UNKNOWN_LABEL).reshape(len(known), -1)[:, 0]).argmax()]
        logits = common - 0.5 if problem.many_labels else torch.arange(len(names)) == common
    else:
        logits = labels.float().mean(dim=0)
    logits = logits.float().reshape(-1)
    value = score(exit_logits, logits.expand(len(exit_logits), -1), metric)
    answer = next(iter(problem.format_prediction(logits.numpy(), names).values()))
    return {"answer": answer, "score": value, "beaten": exit_scores(exit_logits, metric).best > value}


def recorded_fields(config: EarlyExitConfig) -> dict[str, Any]:
    """The config without what it was fitted with."""
    return {k: v for k, v in config.to_dict().items() if k not in ("calibration", "parameters")}


def resolve_metric(metric: str | None, problem_type: str, num_labels: int, tags: Sequence[str] | None = None) -> str:
    """The metric, or the problem type's own where it is None: accuracy, for regression Pearson's correlation, and of
    token classification (`tags`: its labels) the F1 of entities, where the labels name entities."""
    problem = problem_of(problem_type)
    if metric is None:
        return ENTITY_F1 if tags is not None and scheme_of(tags) else problem.default_metric
    each = torch.eye(num_labels)[:, None]  # [K, 1, K]: every label is predicted once
    labels = torch.zeros(problem.label_shape(num_labels, num_labels), dtype=torch.long)
    more: dict[str, Any] = {} if tags is None else {"texts": [0] * num_labels, "label_names": list(tags)}
    exit_scores(ExitLogits(each, labels, problem_type=problem_type, **more), metric)
    return metric


def metric_of(exit_logits: ExitLogits, metric: str | None) -> str:
    """`resolve_metric` of stored logits."""
    tags = None if exit_logits.texts is None else exit_logits.label_names
    return resolve_metric(metric, exit_logits.kind, exit_logits.logits.shape[-1], tags)


def compare_with_checkpoint(model: PeftModel, checkpoint: str, rows: Dataset, batch_size: int = 32) -> dict[str, Any]:
    """Whether full depth of a PEFT model still answers as its checkpoint does: checked, not assumed."""
    badge = get_badge_model(model)
    device = next(badge.model.parameters()).device
    with quiet():
        auto: Any = AutoModelForSequenceClassification
        if badge.config_of().reads_tokens:
            auto = AutoModelForTokenClassification
        base = auto.from_pretrained(checkpoint).to(device).eval()
    features = tensor_columns(badge.model, rows.select(range(min(len(rows), COMPARED))))
    differences = []
    for start in range(0, len(features), batch_size):
        batch = pad_features(features[start : start + batch_size], badge.model, badge.config_of().reads_tokens)
        batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            differences.append((base(**batch).logits.float() - badge(**batch).logits.float()).abs().max())
    largest = float(torch.stack(differences).max())
    return {"rows": len(features), "equal": largest == 0, "largest_difference": largest}


def evaluate_tasks(
    stack: TaskStack, data: str, columns: Columns = Columns(), metric: str | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Scores every task, and counts the blocks that one pass for all of them runs."""
    if columns.label_column is not None:
        raise ValueError(
            f"label_column={columns.label_column!r} is not allowed with several tasks: the labels of a task are in "
            "the column of its name."
        )
    reports = {}
    for task in stack.names:
        adapter = stack.use(task)
        examples = adapter.read(data, labels_of(task, data, columns))
        reports[task] = evaluate_adapter(adapter, examples, metric, batch_size)[0]
    texts = stack.shared.read(data, replace(columns, unlabeled=True))
    configs = stack.early_exit_configs()
    pairs = pairs_of(texts)
    blocks = []
    for start in range(0, len(pairs), batch_size):
        batch, _ = batch_of([*stack.adapters.values()], pairs[start : start + batch_size])
        output = early_exit_forward(
            stack.shared.model,
            tasks=stack.names,
            early_exit_config=configs,
            **batch,
        )
        blocks += output.blocks_run.tolist()
    depth = get_badge_model(stack.shared.model).num_blocks
    mean = sum(blocks) / len(blocks)
    return {
        "rows": len(blocks),
        "num_blocks": depth,
        "mean_blocks": mean,
        "blocks_saved": 1 - mean / (depth * len(reports)),
        "split": texts.split,
        "tasks": reports,
    }


def labels_of(task: str, data: str, columns: Columns) -> Columns:
    """Which columns are read for a task: its labels are in the column of its name, where there is one."""
    splits = read_source(data, columns.dataset_config)
    named = any(task in split.features for split in splits.values())
    if named and not columns.unlabeled:
        return replace(columns, label_column=task)
    return replace(columns, unlabeled=True)
