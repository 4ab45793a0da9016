"""`bench_rankings`: what an adapter saves on the user's own queries. What `badge-peft bench` does for ranking."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.evaluation.timing import Runner, Timed, take_turns
from badge_peft.ranking.calibration import METRIC
from badge_peft.ranking.metrics import top_k_kept
from badge_peft.ranking.segments import CandidatePass, RankedCandidates
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.bench import pinned_threads, stock_model
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import recorded_fields
from badge_peft.workflows.rankings import STATE_BYTES

Array = np.ndarray
_WARMUP = 2  # queries


def bench_rankings(
    adapter: Adapter,
    examples: TextDataset,
    config: EarlyExitConfig | None = None,
    limit: int = 200,
    batch_size: int = 32,
    threads: int | None = None,
) -> dict[str, Any]:
    """Times the model without exits and with them, query by query, in turn.

    Args:
        adapter: From `open_adapter`.
        examples: From `Adapter.read`; queries are timed until they have `limit` candidates.
        config: How candidates leave; None takes the adapter's own.
        limit: Of candidates.
        batch_size: Candidates in a block at once, sorted by length, with exits and without.
        threads: Of torch; None takes its own number.

    Returns:
        As `bench_adapter`: times are those of a query, `score` is the share of queries with full depth's top k.
    """
    config = config or adapter.early_exit_config()
    queries: dict[str, list[int]] = {}
    for i, query in enumerate(examples.queries()):
        queries.setdefault(query, []).append(i)
    counts = np.cumsum([len(rows) for rows in queries.values()])
    chosen = [*queries.values()][: int(np.searchsorted(counts, limit)) + 1]
    encoded = adapter.encode(examples.select([i for rows in chosen for i in rows]))
    rows = tensor_columns(adapter.model.get_base_model(), encoded)
    ends = np.cumsum([len(part) for part in chosen])
    batches = [rows[end - len(part) : end] for end, part in zip(ends, chosen, strict=True)]
    policy = build_policy(config)
    stock = stock_model(adapter)

    def full_depth(candidates: list[dict[str, Any]]) -> RankedCandidates:
        order = sorted(range(len(candidates)), key=lambda i: -len(candidates[i]["input_ids"]))
        scores = np.empty(len(candidates), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = pad_features([candidates[i] for i in part], stock)
            logits = stock(**{name: value.to(adapter.device) for name, value in batch.items()}).logits
            scores[part] = logits[:, 0].float().cpu().numpy()
        return RankedCandidates(scores, np.full(len(scores), adapter.badge.num_blocks), {}, ~np.isfinite(scores))

    def early(candidates: list[dict[str, Any]]) -> RankedCandidates:
        return CandidatePass(adapter.badge, candidates, policy, batch_size, STATE_BYTES).run()

    runners = {"stock PyTorch": full_depth, "BADGE PyTorch": early}
    with pinned_threads(threads) as used, torch.inference_mode():
        timed = take_turns(
            [Runner(run, device=adapter.device) for run in runners.values()],
            batches,
            warmup=batches[:_WARMUP],
            progress="timing",
        )
    k = 10 if config.top_k is None else config.top_k
    return {
        "rows": len(rows),
        "queries": len(batches),
        "batch_size": batch_size,
        "threads": used,
        "spinning": False,
        "device": str(adapter.device),
        "num_blocks": adapter.badge.num_blocks,
        "rule": recorded_fields(config),
        "metric": METRIC,
        "labels": None,
        "results": [
            {"name": name, **_result(each, timed[0].outputs, k)} for name, each in zip(runners, timed, strict=True)
        ],
    }


def _result(timed: Timed, full: list[RankedCandidates], top_k: int) -> dict[str, Any]:
    """Times of a query, and the share of queries whose top k is that of `full` depth."""
    kept = []
    for found, whole in zip(timed.outputs, full, strict=True):
        ends = found.exit_layer == found.exit_layer.max()
        one = np.zeros(len(ends), dtype=np.int64)
        # the two differ by rounding, so the candidates are compared, and not their scores
        places = np.argsort(np.argsort(-whole.scores, kind="stable"))
        kept.append(top_k_kept(-places.astype(float), found.scores, ends, one, top_k, ordered=False)[0])
    exits = np.concatenate([found.exit_layer for found in timed.outputs])
    return {
        "p50_ms": 1e3 * float(np.percentile(timed.seconds, 50)),
        "p95_ms": 1e3 * float(np.percentile(timed.seconds, 95)),
        "examples_per_s": len(exits) / sum(timed.seconds),
        "mean_exit": float(exits.mean()),
        "score": float(np.mean(kept)),
        "answers_as_full_depth": None,
    }
