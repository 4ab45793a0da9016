"""`bench_adapter`: what an adapter saves on the user's own texts, beside what could be run instead. What `badge-peft
bench` does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.collate import pad_features, tensor_columns
from badge_peft.model import get_badge_model
from badge_peft.utils.checks import whole
from badge_peft.workflows.adapter import Adapter
from badge_peft.workflows.contenders import Batch, Contender, onnx_contenders, torch_contenders
from badge_peft.workflows.evaluate import encode_for
from badge_peft.workflows.judge import Judge
from badge_peft.workflows.measure import check_metric
from badge_peft.workflows.predict import exit_rule
from badge_peft.workflows.rows import TextRows

_WARMUP = 5  # batches, and the longest
_PAUSE = 0.005  # seconds before each call: the threads of the runtime that has just finished spin for a while


def bench_adapter(
    adapter: Adapter,
    rows: TextRows,
    rule: EarlyExitConfig | None = None,
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
        rows: From `read_rows`, with `usual=adapter.columns`.
        rule: How to stop; None takes the adapter's own.
        limit: The first so many rows are timed.
        batch_size: Texts at once; times are then those of a batch.
        threads: Of torch and of each session; None takes torch's own number.
        onnx: Whether to export and time ONNX Runtime, too.
        metric: None is accuracy, for regression Pearson.
        progress: Show a progress bar.

    Returns:
        The settings, and under `results` one dict per contender: `name`, `p50_ms`, `p95_ms`, `examples_per_s`,
        `mean_exit`, `score` (None without labels, and for a base model that the adapter's training left behind) and
        `answers_as_full_depth`.

    Raises:
        ImportError: ONNX Runtime is wanted and not installed, or torch is too old to export.
        ValueError: a wrong argument, or a rule that ONNX cannot express.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size), ("threads", threads)):
        whole(name, value, at_least=1)
    if onnx:
        from badge_peft.utils.extras import require_onnx_exporter

        require_onnx_exporter()
    check_metric(metric, adapter.labels.problem_type, len(adapter.labels.names))
    rule = rule or exit_rule(adapter)
    encoded = encode_for(adapter, rows.select(range(min(limit, len(rows)))))
    features = tensor_columns(adapter.model.get_base_model(), encoded)
    labels = torch.tensor([row.pop("labels") for row in features]) if "labels" in features[0] else None
    batches = [
        pad_features(features[start : start + batch_size], adapter.model.get_base_model())
        for start in range(0, len(features), batch_size)
    ]
    with _threads(threads) as used, tempfile.TemporaryDirectory() as folder:
        contenders = torch_contenders(adapter, rule)
        for int8 in (False, True) if onnx else ():
            contenders += onnx_contenders(adapter, rule, Path(folder), used, int8)
        with torch.inference_mode():
            judge = Judge(adapter, labels, _full_depth(adapter, batches), metric)
            measured = _take_turns(contenders, batches, progress)
    return {
        "rows": len(features),
        "batch_size": batch_size,
        "threads": used,
        "spinning": False,
        "device": str(contenders[0].device),
        "num_blocks": get_badge_model(adapter.model).num_blocks,
        "rule": {k: v for k, v in rule.to_dict().items() if k not in ("calibration", "parameters")},
        "metric": judge.metric,
        "labels": "given" if labels is not None else None,
        "results": [judge.result(who, *found) for who, found in zip(contenders, measured, strict=True)],
    }


Measured = tuple[list[float], np.ndarray, np.ndarray | None]  # seconds [batches], logits [N, K], exits [N]


def _take_turns(contenders: list[Contender], batches: list[Batch], progress: bool) -> list[Measured]:
    from tqdm.auto import tqdm

    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    for contender in contenders:
        for batch in (longest, *batches[:_WARMUP]):
            contender.run(contender.prepare(batch))
    times: list[list[float]] = [[] for _ in contenders]
    answers: list[list[Any]] = [[] for _ in contenders]
    for i, batch in enumerate(tqdm(batches, desc="timing", disable=not progress)):
        for turn in range(len(contenders)):
            which = (i + turn) % len(contenders)
            contender = contenders[which]
            seconds, output = _timed(contender, contender.prepare(batch))
            times[which].append(seconds)
            answers[which].append(contender.read(output))
    found: list[Measured] = []
    for seconds_of, said in zip(times, answers, strict=True):
        exits = None if said[0][1] is None else np.concatenate([exits for _, exits in said])
        found.append((seconds_of, np.concatenate([logits for logits, _ in said]), exits))
    return found


def _timed(contender: Contender, inputs: Any) -> tuple[float, Any]:
    wait: Callable[[], None] = torch.cuda.synchronize if contender.device.type == "cuda" else lambda: None
    time.sleep(_PAUSE)
    wait()
    start = time.perf_counter()
    output = contender.run(inputs)
    wait()
    return time.perf_counter() - start, output


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
