"""`bench_rankings`: what an adapter saves on the user's own queries. What `badge-peft bench` does for ranking."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
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
from badge_peft.workflows.bench import onnx_inputs, pinned_threads, stock_model
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import recorded_fields
from badge_peft.workflows.rankings import STATE_BYTES

Array = np.ndarray
Row = dict[str, Any]
Rank = Callable[[list[Row]], RankedCandidates]
_WARMUP = 2  # queries
_PAUSE = 0.005  # seconds before each call: the threads of the runtime that has just finished spin for a while


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
    with pinned_threads(threads) as used, tempfile.TemporaryDirectory() as folder:
        runners = _torch_runners(adapter, config, batch_size)
        if onnx:
            runners |= _onnx_runners(adapter, config, batch_size, Path(folder), used)
        turns = [Runner(run, device=adapter.device) for run in runners.values()]
        with torch.inference_mode():
            timed = take_turns(turns, batches, warmup=batches[:_WARMUP], pause=_PAUSE, progress="timing")
    k = config.resolved_top_k
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
    from badge_peft.export.onnx import OnnxExporter
    from badge_peft.export.plain import FullDepthExporter
    from badge_peft.export.runtime import OnnxEarlyExitModel, open_session

    stock = stock_model(adapter).cpu()
    plain, early = FullDepthExporter(stock), OnnxExporter(adapter.model, config)
    found: dict[str, Rank] = {}
    for suffix in ("", " int8"):
        file, directory = folder / f"full depth{suffix}.onnx", folder / f"early exits{suffix}"
        plain.write(file, int8=bool(suffix))
        early.write(directory, int8=bool(suffix))
        session, model = open_session(file, threads), OnnxEarlyExitModel.from_pretrained(directory, threads=threads)
        names = [entry.name for entry in session.get_inputs()]

        def logits(batch: Any, session: Any = session, names: list[str] = names) -> Array:
            return session.run(["logits"], onnx_inputs(batch, names))[0]

        def rank(candidates: list[Row], model: Any = model, names: list[str] = names) -> RankedCandidates:
            order = np.array(sorted(range(len(candidates)), key=lambda i: -len(candidates[i]["input_ids"])))
            output = model(**onnx_inputs(pad_features([candidates[i] for i in order], stock), names))
            back = np.argsort(order)
            return _ranked(output.logits[back, 0], output.exit_layer[back])

        found[f"ONNX Runtime{suffix}, full depth"] = partial(
            _at_full_depth, logits, stock, adapter.badge.num_blocks, batch_size
        )
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
