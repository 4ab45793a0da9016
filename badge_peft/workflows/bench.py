"""`bench_adapter`: what an adapter saves on the user's own texts, beside what could be run instead. What `badge-peft
bench` does.

A runner takes padded batches [B, S] and gives logits [B, K], and of exits the blocks that answered [B], else None.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation import ExitLogits, collect_exit_logits
from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.evaluation.metrics import score
from badge_peft.evaluation.timing import Runner, Timed, take_turns
from badge_peft.model import get_badge_model
from badge_peft.utils.checks import check_int
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.base_model import keeps_answers
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import recorded_fields, resolve_metric

Batch = dict[str, Tensor]
WARMUP = 5  # batches, and the longest
PAUSE = 0.005  # seconds before each call: the threads of the runtime that has just finished spin for a while


def bench_adapter(
    adapter: Adapter,
    examples: TextDataset,
    config: EarlyExitConfig | None = None,
    limit: int = 200,
    batch_size: int = 1,
    threads: int | None = None,
    onnx: bool = True,
    metric: str | None = None,
) -> dict[str, Any]:
    """Times the model without exits and with them, in PyTorch and in ONNX Runtime (fp32 and int8), on the same texts.

    All take turns batch by batch, in changing order, each with the same number of threads; times are those of the
    model's call alone, without the tokenizer.

    Args:
        adapter: From `open_adapter`.
        examples: From `Adapter.read`; the first `limit` are timed.
        config: How to stop; None takes the adapter's own.
        limit: Of rows.
        batch_size: Texts at once; times are then those of a batch.
        threads: Of torch and of each session; None takes torch's own number.
        onnx: Whether to export and time ONNX Runtime, too.
        metric: None is accuracy, for regression Pearson.

    Returns:
        The settings, and under `results` one dict per runner: `name`, `p50_ms`, `p95_ms`, `examples_per_s`,
        `mean_exit`, `score` (None without labels, and for a base model that the adapter's training left behind) and
        `answers_as_full_depth`.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size), ("threads", threads)):
        check_int(name, value, at_least=1)
    metric = resolve_metric(metric, adapter.labels.problem_type, len(adapter.labels.names))
    config = config or adapter.early_exit_config()
    encoded = adapter.encode(examples.select(range(min(limit, len(examples)))))
    own = collect_exit_logits(adapter.model, encoded, batch_size)
    base = adapter.model.get_base_model()
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in tensor_columns(base, encoded)]
    batches = [pad_features(rows[start : start + batch_size], base) for start in range(0, len(rows), batch_size)]
    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    with pinned_threads(threads) as used, tempfile.TemporaryDirectory() as folder:
        runners = _torch_runners(adapter, config)
        if onnx:
            runners |= _onnx_runners(adapter, config, Path(folder), used)
        warmup = [longest, *batches[:WARMUP]]
        with torch.inference_mode():
            timed = take_turns([*runners.values()], batches, warmup=warmup, pause=PAUSE, progress="timing")
    found = zip(runners, timed, strict=True)
    return {
        "rows": len(rows),
        "batch_size": batch_size,
        "threads": used,
        "spinning": False,
        "device": str(adapter.device),
        "num_blocks": own.depth,
        "rule": recorded_fields(config),
        "metric": metric,
        "labels": "given" if own.labels is not None else None,
        "results": [
            {"name": name, **_result(each, own, metric, keeps_answers(adapter.model))} for name, each in found
        ],
    }


def _torch_runners(adapter: Adapter, config: EarlyExitConfig) -> dict[str, Runner]:
    """Stock PyTorch: the base model with nothing of the adapter around it; and the model with early exits."""
    early = partial(early_exit_forward, adapter.model, early_exit_config=config)

    def move(batch: Batch) -> Batch:
        return {name: value.to(adapter.device) for name, value in batch.items()}

    def read(output: Any) -> tuple[np.ndarray, np.ndarray | None]:
        exits = getattr(output, "exit_layer", None)
        return output.logits.float().cpu().numpy(), None if exits is None else exits.cpu().numpy()

    return {
        "stock PyTorch": Runner(partial(_call, stock_model(adapter)), move, read, adapter.device),
        "BADGE PyTorch": Runner(partial(_call, early), move, read, adapter.device),
    }


def _onnx_runners(adapter: Adapter, config: EarlyExitConfig, folder: Path, threads: int) -> dict[str, Runner]:
    """The same two in ONNX Runtime on the CPU, in float32 and with weights in 8 bits (dynamic quantization); sessions
    pin their threads and do not spin."""
    from badge_peft.export.onnx import OnnxExporter
    from badge_peft.export.plain import FullDepthExporter
    from badge_peft.export.runtime import OnnxEarlyExitModel, open_session

    plain = FullDepthExporter(stock_model(adapter).cpu())
    early = OnnxExporter(adapter.model, config)
    found: dict[str, Runner] = {}
    for suffix in ("", " int8"):
        file, directory = folder / f"full depth{suffix}.onnx", folder / f"early exits{suffix}"
        plain.write(file, int8=bool(suffix))
        early.write(directory, int8=bool(suffix))
        session = open_session(file, threads)
        model = OnnxEarlyExitModel.from_pretrained(directory, threads=threads, spinning=False)
        arrays = partial(onnx_inputs, names=[entry.name for entry in session.get_inputs()])
        found[f"ONNX Runtime{suffix}, full depth"] = Runner(
            partial(session.run, ["logits"]), arrays, lambda output: (output[0], None)
        )
        found[f"BADGE ONNX{suffix}"] = Runner(
            partial(_call, model), arrays, lambda output: (output.logits, output.exit_layer)
        )
    return found


def stock_model(adapter: Adapter) -> Any:
    """A copy of the model with the adapter taken off."""
    return get_badge_model(copy.deepcopy(adapter.model)).unload().eval()


def _call(model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


def onnx_inputs(batch: Batch, names: list[str]) -> dict[str, np.ndarray]:
    """The inputs of a graph; not every tokenizer gives the token_type_ids that it asks for."""
    filled = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
    return {name: filled[name].numpy().astype(np.int64) for name in names}


def _result(timed: Timed, own: ExitLogits, metric: str, stock_counts: bool) -> dict[str, Any]:
    """Times and scores of one runner, against the labels and full depth of the adapter's `own` exit logits. The base
    model without exits has a score where `stock_counts`: it could be in service."""
    logits = torch.from_numpy(np.concatenate([logits for logits, _ in timed.outputs]))  # [N, K]
    exits = [exits for _, exits in timed.outputs if exits is not None]  # of each batch [B]
    comparable = bool(exits) or stock_counts
    same = problem_of(own.kind).same(logits, own.logits[:, -1])
    return {
        **times(timed, len(logits)),
        "mean_exit": float(np.concatenate(exits).mean()) if exits else float(own.depth),
        "score": score(own, logits, metric) if comparable and own.labels is not None else None,
        "answers_as_full_depth": same if comparable else None,
    }


def times(timed: Timed, rows: int) -> dict[str, float]:
    """What the clock says of one runner, which answered `rows` texts."""
    return {
        "p50_ms": 1e3 * float(np.percentile(timed.seconds, 50)),
        "p95_ms": 1e3 * float(np.percentile(timed.seconds, 95)),
        "examples_per_s": rows / sum(timed.seconds),
    }


@contextmanager
def pinned_threads(count: int | None) -> Iterator[int]:
    """Pins torch's threads, and says how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
