"""`evaluate_adapter`: exits, policy and clock on a data set. What `badge-peft evaluate` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation import ExitLogits, collect_exit_logits
from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.evaluation.curve import ExitPromise
from badge_peft.evaluation.latency import measure_latency
from badge_peft.evaluation.metrics import exit_scores, score
from badge_peft.evaluation.tradeoff import TradeOffPoint, evaluate_policy
from badge_peft.hub import LOGITS
from badge_peft.model import get_badge_model
from badge_peft.ranking.calibration import METRIC, RankingPoint, evaluate_ranking, final_ranks
from badge_peft.ranking.metrics import ranking_scores
from badge_peft.utils import distributed
from badge_peft.utils.logs import quiet
from badge_peft.utils.problem import UNKNOWN_LABEL, problem_of
from badge_peft.workflows.adapter_dir import (
    Adapter,
    check_adapter,
    check_ranking_metric,
    early_exit_configs,
    open_adapter,
    read_config,
)
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.predict import batch_of, pairs_of
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.sources import read_source

COMPARED = 512  # rows that are compared with the checkpoint, at most


def evaluate_adapter(
    adapter: Adapter, examples: TextDataset, metric: str | None = None, batch_size: int = 32, latency: int = 0
) -> tuple[dict[str, Any], ExitLogits]:
    """Scores every exit and the adapter's own policy: the report, and the exit logits that it was made from. Without
    labels, scores are the agreement with full depth. `latency` is how many rows to time, one by one, in the first
    process. Several processes share the rows; each has to make the call, and has the result."""
    ranks = adapter.task == "ranking"
    metric = adapter.metric(metric)
    if ranks and latency:
        raise ValueError(
            f"latency={latency} times rows one by one, and candidates of a query are ranked together: leave it out, "
            "and time queries with `badge-peft bench`."
        )
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
    depth, outputs, exits = exit_logits.depth, exit_logits.logits.shape[-1], exit_logits.exits
    wanted = sorted({*(config.get("exit_layers") or range(1, depth + 1)), depth})
    blocks, labels, known = (config.get(name) for name in ("num_blocks", "num_labels", "weights_hash"))
    same_weights = None in (known, exit_logits.weights_hash) or known == exit_logits.weights_hash
    for said, fits, there in (
        (f"{depth} blocks", blocks in (None, depth), blocks),
        (f"{outputs} outputs", labels in (None, outputs), labels),
        (f"exits {exits}", exits == wanted, wanted),
        ("other weights", same_weights, "its own now"),
    ):
        if not fits:
            raise ValueError(
                f"the exit logits are of {said}, but the adapter in {folder} has {there}: give the data to run "
                "through the adapter, or store them anew: "
                f"badge-peft evaluate {folder} DATA --save-logits {Path(folder) / LOGITS}"
            )


def with_queries(exit_logits: ExitLogits, examples: TextDataset) -> ExitLogits:
    """The exit logits of `examples`, in their order, with their queries, and relevance where the rows have labels; a
    row without one is not relevant."""
    labels = None
    if examples.labels is not None:
        values = [0.0 if label is None else _relevance(label, examples, i) for i, label in enumerate(examples.labels)]
        labels = torch.tensor(values)
    return replace(exit_logits, groups=examples.queries(), labels=labels, problem_type="regression")


def _relevance(label: Any, examples: TextDataset, i: int) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < math.inf:
        raise ValueError(
            f"column {examples.columns.get('label')!r} holds {label!r} in row {examples.number(i)}: relevance is a "
            "number, 0 for none. Fix the row, name another column with --label-column, or leave the labels out "
            "(--unlabeled)."
        )
    return value


def measure(exit_logits: ExitLogits, config: EarlyExitConfig, metric: str = "accuracy") -> dict[str, Any]:
    """Scores per exit, and what `config` costs and saves, by replay; without labels every score is the agreement with
    full depth. Of tokens, rows are texts. Of rows with queries scores are the share of these whose top k is that of
    full depth; with labels, nDCG@k and MRR@k are in `relevance`."""
    ranks = exit_logits.groups is not None
    rows: dict[str, Any] = {"rows": len(exit_logits.units)}
    unknown, agreement = 0, None
    if ranks:
        metric = METRIC
        fixed = EarlyExitConfig(policy="fixed_depth", depth=exit_logits.depth, top_k=config.resolved_top_k)
        depths = [replace(fixed, depth=m) for m in exit_logits.exits]
        per_exit = [evaluate_ranking(exit_logits, each).score for each in depths]
        ranked = evaluate_ranking(exit_logits, config)
        point: TradeOffPoint = ranked
        stopped = [int((ranked.exit_layer == m).sum()) for m in exit_logits.exits]
        rows |= {"queries": len(ranked.kept), **_relevance_scores(exit_logits, ranked)}
    else:
        scored = exit_logits.labeled()
        per_exit = exit_scores(scored, metric).per_exit
        point = evaluate_policy(scored, config, metric)
        promise = ExitPromise.of(exit_logits, config)
        agreement, stopped = promise.agreement, list(promise.rows_stopped)
        if exit_logits.labels is not None and problem_of(exit_logits.kind).gives_labels:
            unknown = int(torch.eq(exit_logits.labels, UNKNOWN_LABEL).sum())
        rows |= {} if exit_logits.texts is None else {"tokens": len(exit_logits)}
    return {
        **rows,
        "weights_hash": exit_logits.weights_hash,
        "rows_of_unknown_label": unknown,
        "labels": "full depth's own answers" if ranks or exit_logits.labels is None else "given",
        "metric": metric,
        "num_blocks": exit_logits.depth,
        "exit_layers": exit_logits.exits,
        "per_exit": per_exit,
        "s_avg": float(np.mean(per_exit)),
        "s_best": max(per_exit),
        "full_depth_score": per_exit[-1],
        "early_exit": {
            "config": recorded_fields(config),
            "score": point.score,
            "mean_exit": point.mean_exit,
            "blocks_saved": point.blocks_saved,
            "answers_as_full_depth": agreement,
            "rows_stopped": stopped,
        },
    }


def _relevance_scores(exit_logits: ExitLogits, ranked: RankingPoint) -> dict[str, Any]:
    """`relevance`, where a candidate is relevant."""
    if exit_logits.labels is None or not exit_logits.labels.any():
        return {}
    k = ranked.config.resolved_top_k
    full, early = (
        ranking_scores(scores, exit_logits.labels, exit_logits.groups, k)
        for scores in (exit_logits.logits[:, -1, 0], final_ranks(exit_logits, ranked.exit_layer))
    )
    found = {"top_k": k, "queries": full.queries, "full_depth_ndcg": full.ndcg, "ndcg": early.ndcg}
    return {"relevance": {**found, "full_depth_mrr": full.mrr, "mrr": early.mrr}}


def own_top_k(path: str | Path) -> int:
    """The k of the policy that an adapter's folder has; 10 where it has none, and for all else."""
    early_exit = read_config(path).get("early_exit") if Path(path).is_dir() else None
    return EarlyExitConfig.of(early_exit).resolved_top_k


def constant_answer(exit_logits: ExitLogits, metric: str, names: Sequence[str]) -> dict[str, Any]:
    """The `answer` that is right most often, of values the mean, what it would `score` as that of every row, and
    whether it is `beaten` by an exit."""
    problem = problem_of(exit_logits.kind)
    labels = exit_logits.labels
    assert labels is not None
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


def metric_of(exit_logits: ExitLogits, metric: str | None) -> str:
    """As `Adapter.metric`, of stored logits."""
    if exit_logits.groups is not None:
        return check_ranking_metric(metric)
    names = exit_logits.label_names or [""] * exit_logits.logits.shape[-1]
    return LabelSet(names, exit_logits.kind, exit_logits.texts is not None).metric(metric)


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
    adapters: dict[str, Adapter],
    data: str,
    columns: Columns = Columns(),
    metric: str | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Scores every task, and counts the blocks that one pass for all of them runs."""
    if columns.label_column is not None:
        raise ValueError(
            f"label_column={columns.label_column!r} is not allowed with several tasks: the labels of a task are in "
            "the column of its name."
        )
    reports = {}
    for task, adapter in adapters.items():
        adapter.model.set_adapter(task, inference_mode=True)
        examples = adapter.read(data, labels_of(task, data, columns))
        reports[task] = evaluate_adapter(adapter, examples, metric, batch_size)[0]
    first = next(iter(adapters.values()))
    texts = first.read(data, replace(columns, unlabeled=True))
    configs, pairs = early_exit_configs(adapters), pairs_of(texts)
    blocks = []
    for start in range(0, len(pairs), batch_size):
        batch, _ = batch_of([*adapters.values()], pairs[start : start + batch_size])
        output = early_exit_forward(first.model, tasks=[*adapters], early_exit_config=configs, **batch)
        blocks += output.blocks_run.tolist()
    depth = first.badge.num_blocks
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
