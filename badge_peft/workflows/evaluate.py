"""`evaluate_adapter`: exits, rule and clock on a data set. What `badge-peft evaluate` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from badge_peft.evaluation import ExitLogits, collect_exit_logits
from badge_peft.evaluation.latency import measure_latency
from badge_peft.model import get_badge_model
from badge_peft.utils import distributed
from badge_peft.workflows.adapter import Adapter, open_adapter, stored_logits
from badge_peft.workflows.encode import encode
from badge_peft.workflows.measure import check_metric, measure
from badge_peft.workflows.rows import TextRows, read_rows
from badge_peft.workflows.settings import Columns


def evaluate_adapter(
    adapter: Adapter,
    rows: TextRows,
    metric: str | None = None,
    batch_size: int = 32,
    latency: int = 0,
    progress: bool = True,
) -> tuple[dict[str, Any], ExitLogits]:
    """Scores every exit and the adapter's own exit rule.

    Several processes (`accelerate launch`, `torchrun`) share the rows; each has to make the call, and has the result.

    Args:
        adapter: From `open_adapter`.
        rows: From `read_rows`, with `usual=adapter.columns`; without labels, scores are the agreement with full depth.
        metric: None is accuracy, for regression Pearson.
        batch_size: Rows per pass.
        latency: How many rows to time, one by one, in the first process; 0 for none.
        progress: Show progress bars.

    Returns:
        The report, and the exit logits that it was made from.
    """
    distributed.join()
    check_metric(metric, adapter.labels.problem_type, len(adapter.labels.names))
    encoded = encode_for(adapter, rows)
    exit_logits = collect_exit_logits(
        adapter.model, encoded, batch_size, progress=progress, split_between_processes=True
    )
    report = measure(exit_logits, get_badge_model(adapter.model).get_early_exit_config(), metric)
    report["split"] = rows.split
    if latency and distributed.is_main():
        timed = encoded.select(range(min(latency, len(encoded))))
        found = measure_latency(adapter.model, timed, progress=progress)
        report["latency"] = latency_summary(found.to_dict(), len(timed))
    return report, exit_logits


def latency_summary(measured: dict[str, Any], rows: int) -> dict[str, Any]:
    """The numbers of a `LatencyReport` without those of each row."""
    return {k: v for k, v in measured.items() if not isinstance(v, (list, dict))} | {"rows": rows}


def latency_line(latency: dict[str, Any]) -> str:
    """One line for a terminal."""
    return (
        f"  on the clock ({latency['rows']} rows, one at a time, {latency['device']}, {latency['threads']} threads): "
        f"p50 {latency['p50_ms']:.2f} ms, p95 {latency['p95_ms']:.2f} ms; the model without exits "
        f"{latency['full_depth_p50_ms']:.2f} and {latency['full_depth_p95_ms']:.2f} ms: "
        f"{latency['speedup_paper']:.1%} of the time saved"
    )


def encode_for(adapter: Adapter, rows: TextRows) -> Dataset:
    """Encoded rows with the adapter's targets."""
    return encode(rows, adapter.tokenizer, adapter.labels.targets(rows))


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
    rows = read_rows(data, columns, usual=adapter.columns)
    return collect_exit_logits(adapter.model, encode_for(adapter, rows), batch_size, progress=True)
