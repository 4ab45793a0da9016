"""`bench_adapter`: what an adapter saves on the user's own texts, beside what could be run instead. What `badge-peft
bench` does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.evaluation.timing import take_turns
from badge_peft.model import get_badge_model
from badge_peft.utils.checks import check_int
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import check_metric, default_metric, encode_for
from badge_peft.workflows.predict import resolve_policy_config
from badge_peft.workflows.results import Results
from badge_peft.workflows.runners import Batch, onnx_runners, torch_runners

_WARMUP = 5  # batches, and the longest
_PAUSE = 0.005  # seconds before each call: the threads of the runtime that has just finished spin for a while


def bench_adapter(
    adapter: Adapter,
    examples: TextDataset,
    config: EarlyExitConfig | None = None,
    limit: int = 200,
    batch_size: int = 1,
    threads: int | None = None,
    onnx: bool = True,
    metric: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Times the model without exits and with them, in PyTorch and in ONNX Runtime (fp32 and int8), on the same texts.

    All take turns batch by batch, in changing order, each with the same number of threads; times are those of the
    model's call alone, without the tokenizer.

    Args:
        adapter: From `open_adapter`.
        examples: From `read_examples`, with `recorded=adapter.columns`.
        config: How to stop; None takes the adapter's own.
        limit: The first so many rows are timed.
        batch_size: Texts at once; times are then those of a batch.
        threads: Of torch and of each session; None takes torch's own number.
        onnx: Whether to export and time ONNX Runtime, too.
        metric: None is accuracy, for regression Pearson.
        progress: Show a progress bar.

    Returns:
        The settings, and under `results` one dict per runner: `name`, `p50_ms`, `p95_ms`, `examples_per_s`,
        `mean_exit`, `score` (None without labels, and for a base model that the adapter's training left behind) and
        `answers_as_full_depth`.

    Raises:
        ImportError: ONNX Runtime is wanted and not installed, or torch is too old to export.
        ValueError: a wrong argument, or a policy that ONNX cannot express.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size), ("threads", threads)):
        check_int(name, value, at_least=1)
    if onnx:
        from badge_peft.utils.extras import require_onnx_exporter

        require_onnx_exporter()
    kind = adapter.labels.problem_type
    check_metric(metric, kind, len(adapter.labels.names))
    config = config or resolve_policy_config(adapter)
    encoded = encode_for(adapter, examples.select(range(min(limit, len(examples)))))
    features = tensor_columns(adapter.model.get_base_model(), encoded)
    labels = torch.tensor([row.pop("labels") for row in features]) if "labels" in features[0] else None
    batches = [
        pad_features(features[start : start + batch_size], adapter.model.get_base_model())
        for start in range(0, len(features), batch_size)
    ]
    with _threads(threads) as used, tempfile.TemporaryDirectory() as folder:
        runners = torch_runners(adapter, config)
        if onnx:
            runners += onnx_runners(adapter, config, Path(folder), used)
        with torch.inference_mode():
            longest = max(batches, key=lambda batch: batch["input_ids"].numel())
            results = Results(adapter, labels, _full_depth(adapter, batches), metric or default_metric(kind))
            timed = take_turns(
                runners,
                batches,
                warmup=[longest, *batches[:_WARMUP]],
                pause=_PAUSE,
                progress="timing" if progress else "",
            )
    return {
        "rows": len(features),
        "batch_size": batch_size,
        "threads": used,
        "spinning": False,
        "device": str(runners[0].device),
        "num_blocks": get_badge_model(adapter.model).num_blocks,
        "rule": {k: v for k, v in config.to_dict().items() if k not in ("calibration", "parameters")},
        "metric": results.metric,
        "labels": "given" if labels is not None else None,
        "results": [results.row(runner, found) for runner, found in zip(runners, timed, strict=True)],
    }


def _full_depth(adapter: Adapter, batches: list[Batch]) -> np.ndarray:
    """[N, K]: what the adapter's model answers when nobody leaves."""
    device = next(adapter.model.parameters()).device
    said = [adapter.model(**{k: v.to(device) for k, v in batch.items()}).logits.float().cpu() for batch in batches]
    return torch.cat(said).numpy()


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Pins torch's threads, and says how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
