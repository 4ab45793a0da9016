"""What the workflows know of ranking: the queries of rows, what a policy keeps of their top k, and their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits
from badge_peft.ranking.calibration import METRIC, evaluate_ranking, final_ranks
from badge_peft.ranking.metrics import ranking_scores
from badge_peft.ranking.segments import CandidatePass
from badge_peft.workflows.adapter_dir import Adapter, read_config
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import encode_texts
from badge_peft.workflows.stream import Pair

STATE_BYTES = 2**30  # for the states of one query's candidates


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
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(
            f"column {examples.columns.get('label')!r} holds {label!r} in row {examples.number(i)}: relevance is a "
            "number, 0 for none. Fix the row, name another column with --label-column, or leave the labels out "
            "(--unlabeled)."
        )
    return value


def own_top_k(path: str | Path) -> int:
    """The k of the rule that an adapter's folder has; 10 where it has none, and for all else."""
    early_exit = read_config(path).get("early_exit") if Path(path).is_dir() else None
    return EarlyExitConfig.of(early_exit).resolved_top_k


def measure_ranking(exit_logits: ExitLogits, config: EarlyExitConfig) -> dict[str, Any]:
    """As `workflows.evaluate.measure`, of rows with queries: scores are the share of queries whose top k is that of
    full depth; with labels, nDCG@k and MRR@k are in `relevance`."""
    k = config.resolved_top_k
    depths = [EarlyExitConfig(policy="fixed_depth", depth=m, top_k=k) for m in exit_logits.exits]
    per_exit = [evaluate_ranking(exit_logits, fixed).score for fixed in depths]
    point = evaluate_ranking(exit_logits, config)
    stopped = Counter(point.exit_layer.tolist())
    found: dict[str, Any] = {
        "rows": len(exit_logits),
        "queries": len(point.kept),
        "weights_hash": exit_logits.weights_hash,
        "rows_of_unknown_label": 0,
        "labels": "full depth's own answers",
        "metric": METRIC,
        "num_blocks": exit_logits.depth,
        "exit_layers": exit_logits.exits,
        "per_exit": per_exit,
        "s_avg": float(np.mean(per_exit)),
        "s_best": max(per_exit),
        "full_depth_score": 1.0,
        "early_exit": {
            "score": point.score,
            "mean_exit": point.mean_exit,
            "layer_speedup": point.layer_speedup,
            "answers_as_full_depth": None,
            "rows_stopped": [stopped[m] for m in exit_logits.exits],
        },
    }
    if exit_logits.labels is not None and exit_logits.labels.any():
        assert exit_logits.groups is not None
        full = ranking_scores(exit_logits.logits[:, -1, 0], exit_logits.labels, exit_logits.groups, k)
        early = ranking_scores(
            final_ranks(exit_logits, point.exit_layer),
            exit_logits.labels,
            exit_logits.groups,
            k,
        )
        found["relevance"] = {
            "top_k": k,
            "queries": full.queries,
            "full_depth_ndcg": full.ndcg,
            "ndcg": early.ndcg,
            "full_depth_mrr": full.mrr,
            "mrr": early.mrr,
        }
    return found


def check_metric(metric: str | None) -> None:
    """Refuses a metric that is asked for."""
    if metric is not None:
        raise ValueError(
            f"metric={metric!r} is not for ranking, which is measured by the top k that it keeps: leave it out."
        )


def rank_queries(
    adapter: Adapter, config: EarlyExitConfig, batch_size: int, queries: Iterable[list[Pair]]
) -> list[dict[str, Any]]:
    """Ranks the candidates of each query."""
    return [answer for pairs in queries for answer in _rank(adapter, config, batch_size, pairs)]


def _rank(adapter: Adapter, config: EarlyExitConfig, batch_size: int, pairs: list[Pair]) -> list[dict[str, Any]]:
    documents = [pair[1] for pair in pairs if pair[1] is not None]
    if len(documents) < len(pairs):
        raise ValueError("ranking takes pairs of a query and a document: name the documents with --text-pair-column.")
    columns = encode_texts([pair[0] for pair in pairs], documents, adapter.tokenizer)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    found = CandidatePass(adapter.badge, rows, build_policy(config), batch_size, STATE_BYTES).run()
    last = np.flatnonzero(found.exit_layer == found.exit_layer.max())
    order = last[np.argsort(-found.scores[last], kind="stable")]
    places = dict(zip(order.tolist(), range(1, len(order) + 1), strict=True))
    return [
        {
            "text": pair[0],
            "text_pair": pair[1],
            "value": round(float(score), 6) if np.isfinite(score) else None,
            "exit_layer": int(number),
            "rank": places.get(i),
        }
        for i, (pair, score, number) in enumerate(zip(pairs, found.scores, found.exit_layer, strict=True))
    ]
