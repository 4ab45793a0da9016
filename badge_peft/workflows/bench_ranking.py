"""`bench_rankings`: what an adapter saves on the user's own queries. What `badge-peft bench` does for ranking."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.evaluation.timing import Runner, Timed
from badge_peft.ranking.calibration import METRIC
from badge_peft.ranking.metrics import top_k_kept
from badge_peft.ranking.segments import CandidatePass, RankedCandidates
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.bench import bench, onnx_files, onnx_inputs, stock_model
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import recorded_fields
from badge_peft.workflows.rankings import STATE_BYTES

Array = np.ndarray
Row = dict[str, Any]
Rank = Callable[[list[Row]], RankedCandidates]
_WARMUP = 2  # queries


def bench_rankings(
    adapter: Adapter,
    examples: TextDataset,
    config: EarlyExitConfig | None = None,
    limit: int = 200,
    batch_size: int = 32,
    threads: int | None = None,
    onnx: bool = True,
) -> dict[str, Any]:
    """Times the model without exits and with them, query by query, in turn; in ONNX Runtime, too."""
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

    def runners(threads: int, folder: Path) -> dict[str, Runner]:
        ranks = _torch_runners(adapter, config, batch_size)
        if onnx:
            ranks |= _onnx_runners(adapter, config, batch_size, folder, threads)
        return {name: Runner(rank, device=adapter.device) for name, rank in ranks.items()}

    return {
        "rows": len(rows),
        "queries": len(batches),
        "batch_size": batch_size,
        "spinning": False,
        "device": str(adapter.device),
        "num_blocks": adapter.badge.num_blocks,
        "rule": recorded_fields(config),
        "metric": METRIC,
        "labels": None,
        **bench(runners, batches, batches[:_WARMUP], threads, partial(_result, config.resolved_top_k)),
    }


def _torch_runners(adapter: Adapter, config: EarlyExitConfig, batch_size: int) -> dict[str, Rank]:
    """Stock PyTorch, and PyTorch with early exits."""
    stock, policy = stock_model(adapter), build_policy(config)

    def logits(batch: dict[str, torch.Tensor]) -> Array:
        found = stock(**{name: value.to(adapter.device) for name, value in batch.items()}).logits
        return found.float().cpu().numpy()

    def early(candidates: list[Row]) -> RankedCandidates:
        return CandidatePass(adapter.badge, candidates, policy, batch_size, STATE_BYTES).run()

    full_depth = partial(_at_full_depth, logits, stock, adapter.badge.num_blocks, batch_size)
    return {"stock PyTorch": full_depth, "BADGE PyTorch": early}


def _onnx_runners(
    adapter: Adapter, config: EarlyExitConfig, batch_size: int, folder: Path, threads: int
) -> dict[str, Rank]:
    """The same two in ONNX Runtime on the CPU, in float32 and in int8."""
    base, depth = adapter.model.get_base_model(), adapter.badge.num_blocks
    found: dict[str, Rank] = {}
    for suffix, session, model, names in onnx_files(adapter, config, folder, threads):

        def logits(batch: Any, session: Any = session, names: list[str] = names) -> Array:
            return session.run(["logits"], onnx_inputs(batch, names))[0]

        def rank(candidates: list[Row], model: Any = model, names: list[str] = names) -> RankedCandidates:
            order = np.array(sorted(range(len(candidates)), key=lambda i: -len(candidates[i]["input_ids"])))
            output = model(**onnx_inputs(pad_features([candidates[i] for i in order], base), names))
            back = np.argsort(order)
            return _ranked(output.logits[back, 0], output.exit_layer[back])

        full_depth = partial(_at_full_depth, logits, base, depth, batch_size)
        found[f"ONNX Runtime{suffix}, full depth"] = full_depth
        found[f"BADGE ONNX{suffix}"] = rank
    return found


def _at_full_depth(
    logits: Callable[[Any], Array], model: Any, num_blocks: int, batch_size: int, candidates: list[Row]
) -> RankedCandidates:
    """All candidates in batches of similar length; `logits` makes [b, 1] of one."""
    order = sorted(range(len(candidates)), key=lambda i: -len(candidates[i]["input_ids"]))
    scores = np.empty(len(candidates), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        scores[part] = logits(pad_features([candidates[i] for i in part], model))[:, 0]
    return _ranked(scores, np.full(len(scores), num_blocks))


def _ranked(scores: Array, exit_layer: Array) -> RankedCandidates:
    return RankedCandidates(scores, exit_layer, {}, ~np.isfinite(scores))


def _result(top_k: int, timed: Timed, every: list[Timed]) -> dict[str, Any]:
    """The share of queries whose top k is that of the first runner, which is at full depth."""
    kept = []
    for found, whole in zip(timed.outputs, every[0].outputs, strict=True):
        ends = found.exit_layer == found.exit_layer.max()
        one = np.zeros(len(ends), dtype=np.int64)
        # the two differ by rounding, so the candidates are compared, and not their scores
        places = np.argsort(np.argsort(-whole.scores, kind="stable"))
        kept.append(top_k_kept(-places.astype(float), found.scores, ends, one, top_k, ordered=False)[0])
    exits = np.concatenate([found.exit_layer for found in timed.outputs])
    return {
        "examples_per_s": len(exits) / sum(timed.seconds),
        "mean_exit": float(exits.mean()),
        "score": float(np.mean(kept)),
        "answers_as_full_depth": None,
    }
